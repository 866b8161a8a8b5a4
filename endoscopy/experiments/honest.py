"""The honest table: what it compares at one budget, and what is predicted for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.bundles.building import CARRIED, part_predictions, rounded_bundle
from endoscopy.data.datamodule import Part, PolypSizingDataModule
from endoscopy.evaluation.baselines import baseline_predictions
from endoscopy.evaluation.cue_baselines import REGRESSION, cue_baselines
from endoscopy.evaluation.features import frame_features
from endoscopy.evaluation.honest_table import REFERENCE
from endoscopy.experiments.sizers import taking_part
from endoscopy.inference.in_memory import cue_frames
from endoscopy.metrics import object_table
from endoscopy.training.module import SizingModule

KEPT = ("variant", "unique_id", "patient", "gt", "censored", "predicted_mm")

Trials = Mapping[str, Sequence[Mapping[str, float]]]


class Budget(NamedTuple):
    """What is compared, and what every variant gets.

    Attributes:
        variants: Names; the others are compared with ``plain``.
        seeds: Seeds of training objects, weights and order, at every size.
        sizes: Numbers of training objects, drawn by the seed.
        steps: Optimizer steps of every training.
        trials: Settings of each variant, equally many; none for the configured ones.
        trial_objects: Training objects of a trial.
    """

    variants: tuple[str, ...]
    seeds: Sequence[int]
    sizes: Sequence[int]
    steps: int
    trials: Trials
    trial_objects: int

    def check(self) -> None:
        """Refuse a table without a fair comparison.

        Raises:
            GatesError: A variant is unknown or ``plain`` left out, or the numbers of trials differ.
        """
        taking_part((*self.variants, *self.trials))
        if REFERENCE not in self.variants:
            raise GatesError(
                f"evaluate.variants must contain {REFERENCE!r}, with which the others are "
                f"compared; found {', '.join(self.variants)}"
            )
        counts = {name: len(self.trials.get(name, ())) for name in self.variants}
        if len(set(counts.values())) > 1:
            raise GatesError(
                f"evaluate.trials must give every variant as many trials, found {counts}"
            )


def predicted_objects(
    module: SizingModule, data: PolypSizingDataModule, part: Part
) -> pd.DataFrame:
    """Return what a trained network, rounded to bfloat16, predicts for the objects of a part."""
    return object_table(part_predictions(rounded_bundle(module, data), data, part))


def baseline_objects(data: PolypSizingDataModule) -> pd.DataFrame:
    """Return what is predicted for the test objects without a network.

    A constant and the apparent area, and of rendered data the regression on area and brightness.
    """
    frames = data.load().frames
    test = frames.iloc[data.evaluation_rows("test")]
    test = test[[name for name in CARRIED if name in test]]
    found = baseline_predictions(frames.iloc[data.rows("train")], test)
    if "synthetic" in data.sources:
        cues = cue_baselines(*(frame_features(one) for one in cue_frames(data)))
        found[REGRESSION] = test.assign(predicted_mm=cues[REGRESSION])
    tables = [object_table(table).assign(variant=name) for name, table in found.items()]
    return pd.concat(tables, ignore_index=True)


def kept_columns(objects: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of an object table that a comparison needs, sizes in float32."""
    table = objects[[name for name in KEPT if name in objects]]
    return table.assign(predicted_mm=table["predicted_mm"].astype(np.float32))


def mean_log_error(objects: pd.DataFrame) -> float:
    """Return the mean absolute error of the logarithm of the size."""
    error = np.log(objects["predicted_mm"]) - np.log(objects["gt"])
    return float(error.abs().mean())
