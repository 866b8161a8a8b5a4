"""Scores of audits and studies as rows, and how far the ladder is from the published one."""

import numpy as np
import pandas as pd

from harness.evidence import Bar, Row, holm

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
    """Return every score of a table of an audit or study, with its interval.

    Args:
        name: Of the audit or study, such as ``masks`` or ``ladder_order``.
        table: One row per condition, method or claim.
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
    for figure in figures:
        metric = None if figure in PLAIN else _compared(figure)
        if metric is None:
            rows += _rows(table, label, figure, Row("", task, figure, np.nan))
            continue
        paired = table.get("paired", pd.Series(True, table.index))
        reference = str(table.loc[table[figure].isna(), label].iloc[0])
        rows += _rows(table[~paired], label, figure, Row("", task, figure, np.nan))
        rows += _rows(table[paired], label, figure, Row("", task, metric, np.nan, versus=reference))
    return rows


def _compared(figure: str) -> str | None:
    """Return the metric that a column of differences compares; None if it is a metric itself."""
    if figure == "gain":
        return "ranking_auc"
    metric = figure.removesuffix("_change").removesuffix("_difference")
    return metric if metric != figure else None


def _rows(table: pd.DataFrame, label: str, figure: str, form: Row) -> list[Row]:
    """Return one row per score of a column, like ``form``; p is corrected where there is one."""
    known = table[np.isfinite(table[figure])]
    none = pd.Series(np.nan, known.index)
    low, high = (known.get(f"{figure}_{end}", none) for end in ("low", "high"))
    p = holm(known.get(f"{form.metric}_p_value", none) if form.versus else none)
    units = known["objects" if "objects" in known else "seeds"].astype(int)
    cells = zip(known[label].astype(str), known[figure], low, high, units, p, strict=True)
    return [
        form._replace(method=name, value=value, low=down, high=up, n=n, p=p)
        for name, value, down, up, n, p in cells
    ]


def ladder_bars(table: pd.DataFrame, order: pd.DataFrame, *, prefix: str = "") -> list[Bar]:
    """Return how far the ladder is from the published one, except for the constant.

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
    bars.append(Bar(f"{prefix}ladder, fraction of the claimed order that holds", holds, ">=", 1.0))
    return bars
