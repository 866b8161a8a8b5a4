"""The honest table: kinds of gates beside the plain network, at one budget, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.endoscopy.provenance import rendering_settings, split_settings
from apps.endoscopy.runs import run_settings, write_run
from apps.endoscopy.training import Sizers, Training, changed, run_all
from apps.endoscopy.tuning import Trials, Tuning
from core_gates.errors import GatesError
from endoscopy.bundles.building import CARRIED, part_predictions, rounded_bundle
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.data.provenance import differences
from endoscopy.evaluation.baselines import baseline_predictions
from endoscopy.evaluation.honest_table import REFERENCE, HonestComparison
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table
from endoscopy.training.module import SizingModule
from endoscopy.training.variants import CONFIGURED, VARIANTS
from harness.runs.processes import Tick
from harness.runs.ticker import ticking

RUNS = "runs"
BASELINES = "baselines"
KEPT = ("variant", "unique_id", "patient", "gt", "censored", "predicted_mm")


class HonestTable:
    """Train every variant at every size with every seed, once, and compare them.

    A finished training is a small parquet file of object predictions that tells its settings; what
    is there, here or in the package, and has the same ones, is not trained again. Every training
    takes the same number of optimizer steps.

    Args:
        sizers: Configured network and data.
        variants: Names; ``plain`` is what the others are compared with.
        sizes: Numbers of training objects, drawn by the seed.
        seeds: Seeds of draws, weights and order, at every size.
        steps: Optimizer steps of a training.
        trials: Settings of each variant, equally many, of which the one with the smallest
            validation error is taken; none for the configured ones.
        trial_objects: Training objects of a trial.
        tuning_seed: Seed of a trial.
        cut_offs: Of the predictions.

    Attributes:
        tuning: Trials, and the setting that each variant was given.

    Raises:
        GatesError: A variant is unknown, or the numbers of trials differ.
    """

    def __init__(
        self,
        sizers: Sizers,
        variants: Sequence[str],
        sizes: Sequence[int],
        seeds: Sequence[int],
        steps: int,
        trials: Trials | None = None,
        trial_objects: int = 150,
        tuning_seed: int = 100,
        cut_offs: CutOffs = CONTINUOUS,
    ) -> None:
        self.sizers, self.variants = sizers, tuple(variants)
        self.sizes, self.seeds, self.steps = tuple(sizes), tuple(seeds), steps
        self.cut_offs, trials = cut_offs, trials or {}
        unknown = [name for name in (*self.variants, *trials) if name not in VARIANTS]
        if unknown or REFERENCE not in self.variants:
            raise GatesError(
                f"evaluate.variants must contain {REFERENCE!r} and any of {', '.join(VARIANTS)}; "
                f"found {', '.join(self.variants)}"
            )
        counts = {name: len(trials.get(name, ())) for name in self.variants}
        if len(set(counts.values())) > 1:
            raise GatesError(
                f"evaluate.trials must give every variant as many trials, found {counts}"
            )
        own = {name: trials[name] for name in self.variants if name in trials}
        self.tuning = Tuning(sizers, own, steps, trial_objects, tuning_seed)

    @property
    def folder(self) -> Path:
        """Where the predictions of finished trainings are kept."""
        return self.sizers.run_folder.path / RUNS

    def trainings(self) -> list[Training]:
        """Return all trainings, the largest first."""
        return [
            Training(variant, seed, objects=size)
            for size in sorted(self.sizes, reverse=True)
            for seed in self.seeds
            for variant in self.variants
        ]

    def baselines(self) -> list[Training]:
        """Return what the constant and the apparent area are fitted to, as trainings."""
        return [Training(BASELINES, seed, objects=n) for n in self.sizes for seed in self.seeds]

    def settings(self, training: Training) -> dict[str, Any]:
        """Return everything that decides the predictions of a training, by name."""
        if training.variant != BASELINES:
            rates = (self.tuning.chosen() or {}).get(training.variant, {})
            return self.sizers.settings(training, steps=self.steps, **rates)
        data, rendering = self.sizers.datamodule, self.sizers.rendering
        found = split_settings(data) | {"seed": training.seed, "objects": training.objects}
        return found | (rendering_settings(data, rendering.config) if rendering else {})

    def gap(self, path: Path, training: Training) -> str:
        """Say in which settings finished predictions differ from a training; empty if in none."""
        return differences(run_settings(path), self.settings(training))

    def path(self, training: Training) -> Path | None:
        """Return the predictions of a finished training; None if it must be run.

        Raises:
            GatesError: Those of the run folder have other settings, and may not be overwritten.
        """
        if training.variant != BASELINES and self.tuning.chosen() is None:
            return None
        own, shipped = self._places(training)
        if own.is_file():
            gap = self.gap(own, training)
            if not gap:
                return own
            if not self.sizers.run_folder.overwrite:
                raise GatesError(changed(own, gap))
        return shipped if shipped.is_file() and not self.gap(shipped, training) else None

    def _places(self, training: Training) -> tuple[Path, Path]:
        name = f"{training.name}.parquet"
        return self.folder / name, self.sizers.shipped / name

    def missing(self) -> list[Training]:
        """Return the trainings that must be run, those of the baselines last.

        Raises:
            GatesError: See :meth:`path`.
        """
        wanted = [*self.trainings(), *self.baselines()]
        return [training for training in wanted if self.path(training) is None]

    def named(self, missing: Sequence[Training]) -> str:
        """Say how much is missing."""
        runs = sum(one.variant != BASELINES for one in missing)
        if not runs:
            return f"baselines missing: {len(missing)} of {len(self.baselines())}"
        return f"runs missing: {runs} of {len(self.trainings())}"

    def reason(self, missing: Sequence[Training]) -> str:
        """Say why what is there does not do; empty if nothing is there."""
        if self.tuning.chosen() is None:
            return self.tuning.reason()
        for one in missing:
            for place in self._places(one):
                if place.is_file():
                    return f"{place} has {self.gap(place, one)}"
        return ""

    def run(self) -> None:
        """Tune, then run what is missing on all cores; each run is kept as soon as it is done."""
        if not self.missing():
            return
        self.sizers.datamodule.prepare_data()
        self.sizers.datamodule.setup("fit")
        if self.tuning.chosen() is None:
            self.tune()
        missing = self.missing()
        for one in missing:
            if one.variant == BASELINES:
                self.keep_baselines(one)
        missing = [one for one in missing if one.variant != BASELINES]
        if missing:
            with ticking("training", sum(self.epochs(one) for one in missing)) as tick:
                run_all(self.train, [(one,) for one in missing], tick)

    def epochs(self, training: Training) -> int:
        """Return the epochs that give the number of steps, rounded up."""
        data = self.sizers.datamodule
        assert training.objects is not None
        return -(-self.steps // len(data.variant(train_objects=training.objects).loader("train")))

    def train(self, training: Training, *, tick: Tick) -> Path:
        """Run one training and keep its predictions of the test objects."""
        rates = (self.tuning.chosen() or {}).get(training.variant, {})
        module, data = self.fit(training, rates, tick=tick)
        found = object_table(part_predictions(rounded_bundle(module, data), data, "test"))
        return self._keep(training, found)

    def fit(
        self, training: Training, rates: Mapping[str, float], *, tick: Tick
    ) -> tuple[SizingModule, PolypSizingDataModule]:
        """Return a module trained for the number of steps, and its data."""
        epochs = self.epochs(training)
        return self.sizers.fit(training, tick=tick, epochs=epochs, steps=self.steps, **rates)

    def keep_baselines(self, training: Training) -> Path:
        """Keep what a constant and the apparent area predict for the test objects."""
        data = self.sizers.data(training._replace(variant=CONFIGURED))
        frames = data.load().frames
        test = frames.iloc[data.evaluation_rows("test")]
        test = test[[name for name in CARRIED if name in test]]
        found = baseline_predictions(frames.iloc[data.rows("train")], test)
        tables = [object_table(table).assign(variant=name) for name, table in found.items()]
        return self._keep(training, pd.concat(tables, ignore_index=True))

    def _keep(self, training: Training, found: pd.DataFrame) -> Path:
        table = found[[name for name in KEPT if name in found]]
        table = table.assign(predicted_mm=table["predicted_mm"].astype(np.float32))
        return write_run(self._places(training)[0], table, self.settings(training))

    def tune(self) -> None:
        """Run the trials that are missing, on all cores, and keep the best setting of each."""
        waiting = self.tuning.waiting()
        if waiting:
            training = self.tuning.training(self.variants[0])
            with ticking("tuning", self.epochs(training) * len(waiting)) as tick:
                run_all(self.trial, waiting, tick)
        self.tuning.keep()

    def trial(self, variant: str, number: int, *, tick: Tick) -> None:
        """Train with one setting and keep the mean relative error of the validation objects."""
        training = self.tuning.training(variant)
        module, data = self.fit(training, self.tuning.trials[variant][number], tick=tick)
        predictions = part_predictions(rounded_bundle(module, data), data, "validation")
        objects = object_table(predictions)
        error = (np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs().mean()
        self.tuning.keep_trial(variant, number, float(error))

    def predictions(self) -> pd.DataFrame:
        """Return the predictions of all trainings with variant, train_objects and seed."""
        return self._read(self.trainings())

    def _read(self, trainings: Sequence[Training]) -> pd.DataFrame:
        tables = []
        for training in trainings:
            path = self.path(training)
            if path is None:
                raise GatesError(f"{training.name} was not run: run `gates endoscopy evaluate`")
            table = pd.read_parquet(path)
            if "variant" not in table:
                table = table.assign(variant=training.variant)
            tables.append(table.assign(train_objects=training.objects, seed=training.seed))
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def scores(self) -> HonestComparison:
        """The comparison, its first line and its figures."""
        return HonestComparison(
            self.predictions(), self._read(self.baselines()), cut_offs=self.cut_offs
        )
