"""Figures of an endoscopy report, drawn from what the verbs left in the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
from endoscopy.plots.tables import audit_figure, honest_figure, ladder_figure, study_figure

FOLDER = "audits"
Captioned = tuple[Figure, str]
DATA_SETS = {"digits": "Handwritten digits", "fashion_mnist": "Fashion-MNIST"}
"""Titles of data sets of the study of generalization; a folder has its name."""
AUDITS = {
    "shortcut": (
        "Trained where large lesions are seen from afar (rho 0.8), tested where they are not.",
        "Distance as a shortcut",
    ),
    "partition": (
        "Test objects whose distance agrees with the habit, and those where it does not.",
        "Consistent and inconsistent objects",
    ),
    "masks": ("True masks replaced by those that a user would have.", "Other masks"),
    "boxes": ("Boxes that are wrong by a fifth.", "Wrong boxes"),
    "oracle_scale": (
        "Relative depth with its scale handed in, to a network that has learned on metric depth.",
        "The scale handed in",
    ),
}


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
        "Predicted over true size, with the limits of 95 % of the ratios; the largest last.",
    )
    known = has_known_class(objects["gt"].to_numpy(float), flags_of(objects, "censored"))
    objects = objects[known]
    truth = TRUTH.classes(objects["gt"])
    matrix = confusion_matrix(truth, cut_offs.classes(objects["predicted_mm"]))
    yield confusion_figure(matrix), f"Classes; predictions are cut at {cut_offs}."
    chances = _probabilities(objects, bundle)
    if chances is not None:
        error = float(expected_calibration_error(chances, truth))
        yield (
            reliability_figure(reliability(chances, truth), error=error),
            "Chances of the classes as the calibration objects imply them.",
        )


def audit_figures(folder: Path) -> Iterator[Captioned]:
    """Yield a figure of every audit that was run."""
    for name, (caption, title) in AUDITS.items():
        table = _read(folder, name)
        if table is not None:
            yield audit_figure(table, title=title), caption
    table = _read(folder, "ladder")
    if table is not None:
        yield ladder_figure(table), "Regressions on hand-made cues: what each of them tells."


def study_figures(folder: Path) -> Iterator[Captioned]:
    """Yield figures of the honest table and of the studies of gates, as far as they were run."""
    path = folder / "honest.parquet"
    if path.is_file():
        yield (
            honest_figure(pd.read_parquet(path)),
            "Every kind of gate minus the plain network, at one budget of optimizer steps.",
        )
    table = _read(folder, "planted")
    if table is not None:
        title = "Do gates find planted features?"
        yield (
            study_figure(table, score="ranking_auc", names="method", title=title),
            "Ranking of 8 informative among 64 inputs by the values of the gates.",
        )
    for path in sorted((folder / FOLDER).glob("generalization_*.parquet")):
        name = path.stem.partition("_")[2]
        title = DATA_SETS.get(name, name)
        yield (
            study_figure(pd.read_parquet(path), score="accuracy", names="variant", title=title),
            f"The same small network with and without gates: {title}.",
        )


def _read(folder: Path, name: str) -> pd.DataFrame | None:
    path = folder / FOLDER / f"{name}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _probabilities(objects: pd.DataFrame, bundle: SizingBundle) -> np.ndarray | None:
    if set(PROBABILITIES) <= set(objects.columns):
        return objects[list(PROBABILITIES)].to_numpy(float)
    if bundle.conformal is None:
        return None
    return bundle.conformal.probabilities(objects["predicted_mm"].to_numpy(float))
