"""Predictions that an evaluation scores: of trained networks, and of their baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from endoscopy.bundles.building import frame_predictions, part_predictions
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.frames.dataset import LesionDataset
from endoscopy.evaluation.size_evaluation import TEST, SizeEvaluation, nothing
from endoscopy.experiments.sizers import Networks, Sizers, Training
from endoscopy.inference.in_memory import cue_frames
from endoscopy.metrics import CONTINUOUS, CutOffs


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
            self._predict_test(training)
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

    def _predict_test(self, training: Training) -> None:
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

    def _predict_shift(self, shift: str, frames: LesionDataset, tick: Callable[[], None]) -> None:
        rows = np.arange(len(frames))
        for seed in self.seeds:
            bundle = self.networks(Training(self.main, seed, fold=self.folds[0]))
            found = frame_predictions(bundle, frames, rows, reasons=True)
            self.scores.add(shift, self.main, seed, found)
            tick()
        trained = self.sizers.data(Training(self.main, self.seeds[0], fold=self.folds[0]))
        train = trained.load().frames.iloc[trained.rows("train")]
        self.scores.add_baselines(shift, train, found)
