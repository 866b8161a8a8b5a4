"""Figures of an endoscopy report: how well predicted sizes agree with the truth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from endoscopy.bundles.contents import SizingBundle
from endoscopy.metrics import (
    PROBABILITIES,
    TRUTH,
    CutOffs,
    confusion_matrix,
    expected_calibration_error,
    flags_of,
    has_known_class,
    object_table,
    reliability,
)
from endoscopy.plots.agreement import bland_altman_figure, size_figure
from endoscopy.plots.classes import confusion_figure, reliability_figure

Captioned = tuple[Figure, str]


def agreement_figures(
    frames: pd.DataFrame, bundle: SizingBundle, cut_offs: CutOffs
) -> Iterator[Captioned]:
    """Yield size, Bland-Altman, confusion and reliability of one seed's test objects.

    Args:
        frames: Predictions of frames, perhaps with ``reasons``.
        bundle: The network.
        cut_offs: Of the predictions.
    """
    objects = object_table(frames)
    yield (
        size_figure(objects, bundle.conformal, cut_offs=cut_offs),
        "Median over the frames of every object.",
    )
    yield (
        bland_altman_figure(objects),
        "Predicted over true size; dashed: 95 % limits of agreement of the ratios.",
    )
    known = has_known_class(objects["gt"].to_numpy(float), flags_of(objects, "censored"))
    objects = objects[known]
    truth = TRUTH.classes(objects["gt"])
    matrix = confusion_matrix(truth, cut_offs.classes(objects["predicted_mm"]))
    yield confusion_figure(matrix), f"Size classes; cut-offs of predictions: {cut_offs}."
    chances = _probabilities(objects, bundle)
    if chances is not None:
        error = float(expected_calibration_error(chances, truth))
        yield (
            reliability_figure(reliability(chances, truth), error=error),
            "Class probabilities implied by the calibration objects.",
        )


def _probabilities(objects: pd.DataFrame, bundle: SizingBundle) -> np.ndarray | None:
    if set(PROBABILITIES) <= set(objects.columns):
        return objects[list(PROBABILITIES)].to_numpy(float)
    if bundle.conformal is None:
        return None
    return bundle.conformal.probabilities(objects["predicted_mm"].to_numpy(float))
