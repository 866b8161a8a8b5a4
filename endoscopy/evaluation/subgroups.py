"""Scores of subgroups: shape, site, brand, distance, exposure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.evaluation.scores import score_intervals
from endoscopy.metrics import CONTINUOUS, CutOffs

COLUMNS = ("shape", "site", "brand", "distance_mm", "exposure")
SCORES = ("macro_f1", "mape", "mae_mm", "bias_mm", "sensitivity_diminutive", "sensitivity_large")


def subgroup_table(
    objects: pd.DataFrame,
    by: Sequence[str] = COLUMNS,
    *,
    cut_offs: CutOffs = CONTINUOUS,
    scores: Sequence[str] = SCORES,
    minimum: int = 10,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score all objects, then those of each value of each column.

    Args:
        objects: Object table.
        by: Columns; those that are absent are left out. Numbers are cut at their tertiles.
        cut_offs: Of the predictions.
        scores: Names of :func:`size_scores`.
        minimum: Groups of fewer objects are listed without scores.
        resamples: Number of bootstrap resamples.

    Returns:
        Columns column, group, objects, and each score with ``_low`` and ``_high``.

    Raises:
        GatesError: None of the columns exists.
    """
    present = [name for name in by if name in objects and objects[name].notna().any()]
    if not present:
        raise GatesError(f"the table has none of the columns {', '.join(by)} to group by")
    groups = [("all", "all", np.ones(len(objects), dtype=bool))]
    for name in present:
        labels = _labels(objects[name])
        groups += [(name, str(v), (labels == v).to_numpy()) for v in _sorted_values(labels)]
    rows = []
    for column, group, inside in groups:
        row: dict[str, object] = {"column": column, "group": group, "objects": int(inside.sum())}
        if inside.sum() >= minimum:
            intervals = score_intervals(objects[inside], cut_offs, only=scores, resamples=resamples)
            for score in scores:
                value, low, high, _ = intervals[score]
                row |= {score: value, f"{score}_low": low, f"{score}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _labels(values: pd.Series) -> pd.Series:
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return values.astype("string").fillna("unknown")
    edges = [-np.inf, *values.quantile([1 / 3, 2 / 3]).tolist(), np.inf]
    names = [f"≤ {edges[1]:.3g}", f"{edges[1]:.3g} to {edges[2]:.3g}", f"> {edges[2]:.3g}"]
    if edges[1] == edges[2]:
        return pd.Series(np.where(values <= edges[1], names[0], names[2]), values.index)
    return pd.cut(values, edges, labels=names).astype("string").fillna("unknown")


def _sorted_values(labels: pd.Series) -> list[str]:
    order = {"≤": 0, ">": 2, "u": 3} if "≤" in "".join(labels.unique()) else {}
    return sorted(labels.unique(), key=lambda label: (order.get(str(label)[0], 1), str(label)))
