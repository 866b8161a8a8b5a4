"""Rows of an audit: the scores of one predictor under several conditions."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from endoscopy.evaluation.scores import score_differences, score_intervals
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table

SCORES = ("macro_f1", "mape", "bias_mm")


def condition_rows(
    conditions: Mapping[str, pd.DataFrame],
    *,
    reference: str,
    cut_offs: CutOffs = CONTINUOUS,
    scores: Sequence[str] = SCORES,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score the predictions under every condition, and their change from one of them.

    Args:
        conditions: Name -> predictions of frames. Changes are paired where a condition has the
            objects of the reference; other conditions are compared as independent samples.
        reference: Name of the condition that the others are compared with.
        cut_offs: Of the predictions.
        scores: Names of :func:`endoscopy.evaluation.scores.size_scores`.
        resamples: Number of bootstrap resamples.

    Returns:
        One row per condition: condition, objects, paired, and for each score ``{score}`` and
        ``{score}_change`` with ``_low`` and ``_high``, and ``{score}_p_value`` of paired changes.
    """
    tables = {name: object_table(predictions) for name, predictions in conditions.items()}
    base = tables[reference]
    of_base = score_intervals(base, cut_offs, only=scores, resamples=resamples)
    rows = []
    for name, table in tables.items():
        values = score_intervals(table, cut_offs, only=scores, resamples=resamples)
        paired, gaps = set(table["unique_id"]) == set(base["unique_id"]), {}
        if name != reference and paired:
            gaps = score_differences(table, base, cut_offs, only=scores, resamples=resamples)
        row: dict[str, object] = {"condition": name, "objects": len(table), "paired": paired}
        for score in scores:
            row |= _named(score, values[score][:3])
            if score in gaps:
                row |= _named(f"{score}_change", gaps[score][:3])
                row[f"{score}_p_value"] = gaps[score].p
            elif name != reference:
                change = _independent(values[score][:3], of_base[score][:3])
                row |= _named(f"{score}_change", change)
        rows.append(row)
    return pd.DataFrame(rows)


def _named(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _independent(
    value: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the difference of two independent scores, its half widths added in quadrature."""
    gap = value[0] - other[0]
    down = np.hypot(value[0] - value[1], other[2] - other[0])
    up = np.hypot(value[2] - value[0], other[0] - other[1])
    return gap, float(gap - down), float(gap + up)
