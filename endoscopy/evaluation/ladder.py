"""The identifiability ladder: how much each cue explains, without a network.

Size is apparent extent times distance. The ladder regresses log size on the extent and on cues
of the distance: depth, or brightness, which falls with its square.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from endoscopy.evaluation.baselines import fit_log_linear
from endoscopy.evaluation.size_scores import score_differences, score_intervals
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table

SCORES = ("mape", "mae_mm", "macro_f1", "f1_5mm", "f1_10mm")
COMPARED = ("macro_f1", "mape")


class Rung(NamedTuple):
    """A set of features, measured under one exposure.

    Attributes:
        name: Of the row.
        exposure: ``fixed`` or ``agc``.
        features: Columns of :func:`frame_features`.
        mape: Published prototype, for comparison.
        macro_f1: The same.
    """

    name: str
    exposure: str
    features: tuple[str, ...]
    mape: float
    macro_f1: float


AREA, MIN_MAX, LOCAL_FIXED, LOCAL_AGC, FRAME_AGC, METRIC = (
    "apparent area",
    "area + per-frame min-max depth",
    "area + local brightness, fixed gain",
    "area + local brightness, AGC",
    "area + local brightness + frame mean, AGC",
    "area + metric depth",
)
RUNGS = (
    Rung("constant", "fixed", (), 0.612, 0.156),
    Rung(AREA, "fixed", ("log_extent",), 0.319, 0.692),
    Rung(MIN_MAX, "fixed", ("log_extent", "relative_depth"), 0.306, 0.730),
    Rung(LOCAL_FIXED, "fixed", ("log_extent", "local_brightness"), 0.138, 0.872),
    Rung(LOCAL_AGC, "agc", ("log_extent", "local_brightness"), 0.286, 0.746),
    Rung(FRAME_AGC, "agc", ("log_extent", "local_brightness", "frame_brightness"), 0.187, 0.864),
    Rung(METRIC, "fixed", ("log_extent", "log_depth"), 0.129, 0.900),
)

NEGLIGIBLE = 0.3
"""A cue adds almost nothing if it gains less than this fraction of what metric depth gains."""


def ladder_predictions(
    train: Mapping[str, pd.DataFrame],
    test: Mapping[str, pd.DataFrame],
    rungs: Sequence[Rung] = RUNGS,
) -> dict[str, pd.DataFrame]:
    """Fit every rung on the training objects and predict the test objects.

    Args:
        train: Exposure -> :func:`frame_features` of the training frames.
        test: The same of the test frames.
        rungs: What to fit.

    Returns:
        Name of the rung -> object table, the median over frames.
    """
    result = {}
    for rung in rungs:
        fitted, tested = train[rung.exposure], test[rung.exposure]
        columns = list(rung.features)
        model = fit_log_linear(
            fitted[columns].to_numpy(float),
            fitted["gt"].to_numpy(float),
            fitted["unique_id"].to_numpy(),
        )
        sizes = model.predict(tested[columns].to_numpy(float))
        result[rung.name] = object_table(
            tested[["unique_id", "gt"]].assign(predicted_mm=np.broadcast_to(sizes, len(tested)))
        )
    return result


def ladder(
    train: Mapping[str, pd.DataFrame],
    test: Mapping[str, pd.DataFrame],
    *,
    rungs: Sequence[Rung] = RUNGS,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Tabulate the rungs.

    Args:
        train: Exposure -> :func:`frame_features` of the training frames, 700 objects.
        test: The same of the test frames, 3,000 objects.
        rungs: What to fit.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples of objects.

    Returns:
        One row per rung: features, exposure, objects; mape, mae_mm, macro_f1, f1_5mm and f1_10mm
        with ``_low`` and ``_high``; the prototype's mape and macro_f1 with the suffix
        ``_published``.
    """
    rows = []
    tables = ladder_predictions(train, test, rungs)
    for rung in rungs:
        table = tables[rung.name]
        row: dict[str, object] = {
            "features": rung.name, "exposure": rung.exposure, "objects": len(table)
        }  # fmt: skip
        intervals = score_intervals(table, cut_offs, only=SCORES, resamples=resamples)
        for score in SCORES:
            value, low, high, _ = intervals[score]
            row |= {score: value, f"{score}_low": low, f"{score}_high": high}
        row |= {"mape_published": rung.mape, "macro_f1_published": rung.macro_f1}
        rows.append(row)
    return pd.DataFrame(rows)


def ladder_order(
    tables: Mapping[str, pd.DataFrame],
    *,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Check the order of the rungs by paired differences.

    ``A < B``: B is significantly better in MAPE and macro F1. ``A ≤ B``: A is not significantly
    better in macro F1. ``A ≈ B``: in MAPE, B gains less than 30 % of what metric depth gains over
    the area, with the whole interval.

    Args:
        tables: Of :func:`ladder_predictions`.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples of objects.

    Returns:
        One row per claim: lower, relation, upper, holds, and the differences upper - lower of mape
        and macro_f1 with ``_low`` and ``_high``.
    """
    claims = [
        ("constant", "<", AREA),
        (AREA, "≈", MIN_MAX),
        (MIN_MAX, "<", LOCAL_FIXED),
        (LOCAL_FIXED, "≤", METRIC),
        (AREA, "≈", LOCAL_AGC),
    ]
    full = score_differences(
        tables[METRIC], tables[AREA], cut_offs, only=COMPARED, resamples=resamples
    )
    rows = []
    for lower, relation, upper in claims:
        gaps = score_differences(
            tables[upper], tables[lower], cut_offs, only=COMPARED, resamples=resamples
        )
        f1, mape = gaps["macro_f1"], gaps["mape"]
        holds = {
            "<": f1.significant and mape.significant and mape.value < 0 < f1.value,
            "≤": f1.high >= 0,
            "≈": max(abs(mape.low), abs(mape.high)) < NEGLIGIBLE * -full["mape"].value,
        }[relation]
        row = {"lower": lower, "relation": relation, "upper": upper, "holds": bool(holds)}
        for name, gap in (("mape", mape), ("macro_f1", f1)):
            row |= {name: gap.value, f"{name}_low": gap.low, f"{name}_high": gap.high}
        rows.append(row)
    return pd.DataFrame(rows)
