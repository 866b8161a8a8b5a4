"""Figures of audits and studies as rows, and how far the ladder is from the published one."""

import numpy as np
import pandas as pd

from harness.evidence.rows import Bar, Row

NAMES = {
    "ladder": "features",
    "planted": "method",
    "generalization": "variant",
}
"""Column that names the rows of a table, by its first word; ``condition`` for audits."""

PLAIN = ("overlap", "log_change", "correlation")
LADDER_MAPE, LADDER_F1 = 0.03, 0.06
"""How far the ladder may be from the published one."""


def table_rows(name: str, table: pd.DataFrame, *, task: str) -> list[Row]:
    """Return every figure of a table of an audit or study, with its interval.

    Args:
        name: Of the audit or study, such as ``masks`` or ``ladder_order``.
        table: One row a condition, method or claim.
        task: Of the rows.
    """
    rows: list[Row] = []
    if name == "ladder_order":
        for _, one in table.iterrows():
            claim = f"{one['lower']} {one['relation']} {one['upper']}"
            rows.append(Row(claim, task, "holds", float(one["holds"])))
        return rows
    label = NAMES.get(name.partition("_")[0], "condition")
    figures = [c for c in table.columns if f"{c}_low" in table or c in PLAIN]
    for _, one in table.iterrows():
        units = int(one["objects"] if "objects" in table else one["seeds"])
        for figure in figures:
            bounds = (one.get(f"{figure}_low", np.nan), one.get(f"{figure}_high", np.nan))
            if np.isfinite(one[figure]):
                rows.append(Row(str(one[label]), task, figure, one[figure], *bounds, units))
    return rows


def ladder_bars(table: pd.DataFrame, order: pd.DataFrame, *, prefix: str = "") -> list[Bar]:
    """Return how far the ladder is from the published one, the constant row excepted.

    Args:
        table: Of :func:`endoscopy.evaluation.ladder.ladder`.
        order: Of :func:`endoscopy.evaluation.ladder.ladder_order`.
        prefix: Put before the names of the bars.
    """
    table = table[table["features"] != "constant"]
    bars = []
    for score, most in (("mape", LADDER_MAPE), ("macro_f1", LADDER_F1)):
        gap = float((table[score] - table[f"{score}_published"]).abs().max())
        name = f"{prefix}ladder, largest distance of {score} from the prototype"
        bars.append(Bar(name, gap, "<=", most))
    holds = float(order["holds"].mean())
    bars.append(Bar(f"{prefix}ladder, share of the claimed order that holds", holds, ">=", 1.0))
    return bars
