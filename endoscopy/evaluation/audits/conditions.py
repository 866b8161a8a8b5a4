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
    """Score the predictions under every condition, and their change against one of them.

    Args:
        conditions: Name -> predictions of frames. Changes are paired where a condition has the
            objects of the reference; other conditions are compared as independent samples.
        reference: Name of the condition that the others are compared with.
        cut_offs: Of the predictions.
        scores: Names of :func:`endoscopy.evaluation.scores.size_scores`.
        resamples: Draws of the bootstrap.

    Returns:
        One row a condition: condition, objects, paired, and of each score ``{score}``,
        ``{score}_low``, ``{score}_high``, ``{score}_change``, ``{score}_change_low`` and
        ``{score}_change_high``.
    """
    tables = {name: object_table(predictions) for name, predictions in conditions.items()}
    base = tables[reference]
    of_base = score_intervals(base, cut_offs, only=scores, resamples=resamples)
    rows = []
    for name, table in tables.items():
        values = score_intervals(table, cut_offs, only=scores, resamples=resamples)
        paired = set(table["unique_id"]) == set(base["unique_id"])
        changes = {}
        if name != reference and paired:
            gaps = score_differences(table, base, cut_offs, only=scores, resamples=resamples)
            changes = {score: (gap.value, gap.low, gap.high) for score, gap in gaps.items()}
        row: dict[str, object] = {"condition": name, "objects": len(table), "paired": paired}
        for score in scores:
            value, low, high, _ = values[score]
            row |= {score: value, f"{score}_low": low, f"{score}_high": high}
            if name == reference:
                continue
            change = changes.get(score) or _independent(values[score][:3], of_base[score][:3])
            row |= dict(
                zip((f"{score}_change{end}" for end in ("", "_low", "_high")), change, strict=True)
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _independent(
    value: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the difference of two independent scores, its half widths added in squares."""
    gap = value[0] - other[0]
    down = np.hypot(value[0] - value[1], other[2] - other[0])
    up = np.hypot(value[2] - value[0], other[0] - other[1])
    return gap, float(gap - down), float(gap + up)
