"""Predictions that an evaluation scores: of networks, of baselines, and for the honest table."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from endoscopy.bundles.bundle_fitting import (
    CARRIED,
    frame_predictions,
    part_predictions,
    rounded_bundle,
)
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.data.samples import LesionDataset
from endoscopy.data.sizing_datamodule import Part, PolypSizingDataModule
from endoscopy.evaluation.baselines import REGRESSION, baseline_predictions, cue_baselines
from endoscopy.evaluation.honest_table import REFERENCE
from endoscopy.evaluation.rendered_frames import frame_features
from endoscopy.evaluation.size_evaluation import TEST, SizeEvaluation, nothing
from endoscopy.experiments.sizers import Networks, Sizers, Training, taking_part
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table
from endoscopy.prediction import cue_frames
from endoscopy.training.sizing_module import SizingModule


class Evaluation:
    """Predict with variants and seeds on the test part, and with the first variant under shifts.

    Args:
        sizers: The networks and their data.
        networks: Returns a trained one.
        variants: Names of variants; bars and intervals refer to the first.
        seeds: Seeds of each.
        folds: Folds whose test parts are pooled; none for the configured one.
        cut_offs: Of the predictions.
        resamples: Number of bootstrap resamples.

    Attributes:
        scores: What was predicted, to be scored.
    """

    def __init__(
        self,
        sizers: Sizers,
        networks: Networks,
        variants: Sequence[str],
        seeds: Sequence[int],
        folds: Sequence[int] = (),
        cut_offs: CutOffs = CONTINUOUS,
        resamples: int = 2000,
    ) -> None:
        self.sizers, self.networks = sizers, networks
        self.variants, self.seeds = tuple(variants), tuple(seeds)
        self.folds: tuple[int | None, ...] = tuple(folds) or (None,)
        self.scores = SizeEvaluation(self.main, cut_offs, resamples)

    @property
    def main(self) -> str:
        """The variant to which bars and intervals refer."""
        return self.variants[0]

    def trainings(self) -> list[Training]:
        """Return every training that is scored."""
        return [
            Training(variant, seed, fold=fold)
            for variant in self.variants
            for seed in self.seeds
            for fold in self.folds
        ]

    def run(self, shifts: Sequence[str] = (), tick: Callable[[], None] = nothing) -> None:
        """Predict everything.

        Args:
            shifts: Names of rendered sets on which the main variant predicts, too.
            tick: Called as often as :meth:`ticks` says.
        """
        for training in self.trainings():
            bundle, data = self.networks(training), self.sizers.data(training)
            main = training.variant == self.main
            found = part_predictions(bundle, data, "test", reasons=main)
            self.scores.add(TEST, training.variant, training.seed, found)
            if main and len(self.folds) == 1 and bundle.conformal is not None:
                self.scores.intervals[training.seed] = bundle.conformal
            if main and training.seed == self.seeds[0]:
                train = data.load().frames.iloc[data.rows("train")]
                self.scores.add_baselines(TEST, train, found)
                if "synthetic" in data.sources:
                    self.scores.add_cues(*cue_frames(data), found)
            tick()
        rendering = self.sizers.rendering
        for shift in shifts:
            assert rendering is not None
            self._predict_shift(shift, rendering.shifted(self.sizers.datamodule, shift), tick)

    def ticks(self, shifts: Sequence[str] = ()) -> int:
        """Return the number of sets to be predicted."""
        return len(self.trainings()) + len(shifts) * len(self.seeds)

    def bundles(self) -> list[SizingBundle]:
        """Return the networks of the main variant, one per seed, of the first fold."""
        return [self.networks(Training(self.main, seed, fold=self.folds[0])) for seed in self.seeds]

    def _predict_shift(self, shift: str, frames: LesionDataset, tick: Callable[[], None]) -> None:
        for seed, bundle in zip(self.seeds, self.bundles(), strict=True):
            found = frame_predictions(bundle, frames, np.arange(len(frames)), reasons=True)
            self.scores.add(shift, self.main, seed, found)
            tick()
        trained = self.sizers.data(Training(self.main, self.seeds[0], fold=self.folds[0]))
        train = trained.load().frames.iloc[trained.rows("train")]
        self.scores.add_baselines(shift, train, found)


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
    return float((np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs().mean())
