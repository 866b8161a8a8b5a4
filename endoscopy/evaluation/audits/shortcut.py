"""Does the model infer the size from how the camera was held?

In routine examinations the distance of the camera correlates with the size of the lesion. A model
can learn that instead of the size. The audit trains where the two correlate and tests where they do
not, and, within one test set, where they contradict the correlation.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.evaluation.audits.conditions import condition_rows
from endoscopy.evaluation.frames import FrameStack, Predictor, predictions_of
from endoscopy.metrics import CONTINUOUS, CutOffs


def shortcut_audit(
    predict: Predictor,
    tests: Mapping[float, FrameStack],
    *,
    trained_rho: float = 0.8,
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Test one predictor where log distance shifts by ``rho`` times log size, for several rho.

    Args:
        predict: Trained at ``trained_rho``.
        tests: rho -> frames of held-out objects; with the trained rho among them. Changes are
            paired if all have the same objects.
        trained_rho: Correlation in training.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows ``rho 0.8``, ``rho 0``, … of :func:`condition_rows`; changes are from the trained
        rho.

    Raises:
        GatesError: The trained rho is not tested.
    """
    if trained_rho not in tests:
        raise GatesError(f"the tests have rho {sorted(tests)}, expected the trained {trained_rho}"
                         " among them")  # fmt: skip
    order = sorted(tests, key=lambda rho: abs(rho - trained_rho))
    return condition_rows(
        {f"rho {rho:g}": predictions_of(predict, tests[rho]) for rho in order},
        reference=f"rho {trained_rho:g}",
        cut_offs=cut_offs,
        resamples=resamples,
    )


def partition_audit(
    predictions: pd.DataFrame,
    *,
    cue: str = "distance_mm",
    cut_offs: CutOffs = CONTINUOUS,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Score objects whose cue agrees with the habit, and those whose cue does not, separately.

    The habit is the sign of the rank correlation of cue and size over all objects; an object is
    consistent if its cue and its size lie on those sides of their medians that the habit implies.

    Args:
        predictions: Frames with gt, predicted_mm and the cue, a number.
        cue: Column that a shortcut could use.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Returns:
        Rows consistent and inconsistent of :func:`condition_rows`, and the column ``correlation``.

    Raises:
        GatesError: The cue is missing, or one part has no object.
    """
    if cue not in predictions:
        raise GatesError(f"the predictions lack the column {cue} to partition by")
    objects = predictions.groupby("unique_id").agg(gt=("gt", "first"), cue=(cue, "median"))
    correlation = float(objects["gt"].corr(objects["cue"], method="spearman"))
    side = (objects["gt"] > objects["gt"].median()) == (objects["cue"] > objects["cue"].median())
    consistent = objects.index[side == (correlation >= 0)]
    inside = predictions["unique_id"].isin(consistent).to_numpy()
    if inside.all() or not inside.any():
        raise GatesError(f"all objects lie on one side of the habit of {cue}; nothing to compare")
    rows = condition_rows(
        {"consistent": predictions[inside], "inconsistent": predictions[np.logical_not(inside)]},
        reference="consistent",
        cut_offs=cut_offs,
        resamples=resamples,
    )
    return rows.assign(correlation=correlation)
