"""The honest table: kinds of gates beside the plain network, at one budget, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.endoscopy_training import WEIGHTS, Sizers, Training, run_all
from apps.files import write_bytes, write_json
from apps.processes import Tick
from apps.scores import Row
from apps.ticker import ticking
from core_gates.errors import GatesError
from endoscopy.bundling import part_predictions, rounded_bundle
from endoscopy.evaluation.honest_table import REFERENCE, honest_headline, honest_table
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table
from endoscopy.variants import VARIANTS

RUNS = "runs"
SETTINGS = "settings.json"
KEPT = ("unique_id", "patient", "gt", "censored", "predicted_mm")
SCORES = ("macro_f1", "mape")
Trials = Mapping[str, Sequence[Mapping[str, float]]]


class HonestTable:
    """Train every variant at every size with every seed, once, and compare them.

    A finished training is a small parquet file of object predictions; what is there is not trained
    again, here or in the package. Every training takes the same number of optimizer steps.

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
        self.trials, self.cut_offs = dict(trials or {}), cut_offs
        self.trial_objects, self.tuning_seed = trial_objects, tuning_seed
        unknown = [name for name in (*self.variants, *self.trials) if name not in VARIANTS]
        if unknown or REFERENCE not in self.variants:
            raise GatesError(
                f"evaluate.variants must contain {REFERENCE!r} and any of {', '.join(VARIANTS)}; "
                f"found {', '.join(self.variants)}"
            )
        counts = {name: len(self.trials.get(name, ())) for name in self.variants}
        if len(set(counts.values())) > 1:
            raise GatesError(
                f"evaluate.trials must give every variant as many trials, found {counts}"
            )

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

    def path(self, training: Training) -> Path | None:
        """Return the predictions of a finished training; None if it must be run."""
        name = f"{training.name}.parquet"
        shipped = Path(str(files("endoscopy"))) / WEIGHTS / self.sizers.config / name
        return next((place for place in (self.folder / name, shipped) if place.is_file()), None)

    def missing(self) -> list[Training]:
        """Return the trainings that must be run."""
        return [training for training in self.trainings() if self.path(training) is None]

    def run(self) -> None:
        """Tune, then run what is missing on all cores; each run is kept as soon as it is done."""
        missing = self.missing()
        if not missing:
            return
        self.sizers.datamodule.prepare_data()
        self.sizers.datamodule.setup("fit")
        settings = self.tune()
        with ticking("training", sum(self.epochs(one) for one in missing)) as tick:
            run_all(self.train, [(one, settings.get(one.variant, {})) for one in missing], tick)

    def epochs(self, training: Training) -> int:
        """Return the epochs that give the number of steps, rounded up."""
        data = self.sizers.datamodule
        assert training.objects is not None
        return -(-self.steps // len(data.variant(train_objects=training.objects).loader("train")))

    def train(self, training: Training, setting: Mapping[str, float], *, tick: Tick) -> Path:
        """Run one training and keep its predictions of the test objects."""
        module, data = self.sizers.fit(
            training, tick=tick, epochs=self.epochs(training), steps=self.steps, **setting
        )
        found = object_table(part_predictions(rounded_bundle(module, data), data, "test"))
        table = found[[name for name in KEPT if name in found]]
        table = table.assign(predicted_mm=table["predicted_mm"].astype(np.float32))
        content = table.to_parquet(None, index=False)
        return write_bytes(self.folder / f"{training.name}.parquet", content)

    def tune(self) -> dict[str, dict[str, float]]:
        """Return the best setting of each variant, those of an earlier tuning if there are."""
        if not self.trials:
            return {}
        path = self.sizers.run_folder.path / SETTINGS
        trials = [(n, k) for n in self.variants for k in range(len(self.trials[n]))]
        found = _read_trials(path)
        waiting = [(n, k) for n, k in trials if _trial_name(n, k) not in found]
        if waiting:
            training = Training(self.variants[0], self.tuning_seed, self.trial_objects)
            with ticking("tuning", self.epochs(training) * len(waiting)) as tick:
                run_all(self.trial, waiting, tick)
            found = _read_trials(path)
        best = {}
        for name in self.variants:
            errors = [found[_trial_name(name, k)] for k in range(len(self.trials[name]))]
            best[name] = dict(self.trials[name][int(np.argmin(errors))])
        return best

    def trial(self, variant: str, number: int, *, tick: Tick) -> None:
        """Train with one setting and keep the mean relative error of the validation objects."""
        training = Training(variant, self.tuning_seed, objects=self.trial_objects)
        module, data = self.sizers.fit(
            training,
            tick=tick,
            epochs=self.epochs(training),
            steps=self.steps,
            **self.trials[variant][number],
        )
        predictions = part_predictions(rounded_bundle(module, data), data, "validation")
        objects = object_table(predictions)
        error = (np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs().mean()
        folder = self.sizers.run_folder.path / "trials"
        write_json(folder / f"{_trial_name(variant, number)}.json", {"error": float(error)})

    def predictions(self) -> pd.DataFrame:
        """Return the predictions of all trainings with variant, train_objects and seed."""
        tables = []
        for training in self.trainings():
            path = self.path(training)
            if path is None:
                raise GatesError(f"{training.name} was not run: run `gates endoscopy evaluate`")
            tables.append(
                pd.read_parquet(path).assign(
                    variant=training.variant, train_objects=training.objects, seed=training.seed
                )
            )
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The comparison, see :func:`endoscopy.evaluation.honest_table.honest_table`."""
        return honest_table(self.predictions(), cut_offs=self.cut_offs)

    @property
    def headline(self) -> str:
        """What the table shows, in a sentence."""
        return honest_headline(self.table)

    def rows(self) -> list[Row]:
        """Return scores and differences from the plain network."""
        rows = []
        for _, one in self.table.iterrows():
            task, units = f"{one['train_objects']} objects", int(one["test_objects"])
            value = (one["value"], one["low"], one["high"])
            rows.append(Row(one["variant"], task, one["score"], *value, n=units))
            if np.isfinite(one["difference"]):
                gap = (one["difference"], one["difference_low"], one["difference_high"])
                name = f"{one['score']} minus plain"
                rows.append(Row(one["variant"], task, name, *gap, n=units))
                rows.append(Row(one["variant"], task, f"p_holm of {one['score']}", one["p_holm"]))
        return rows


def _trial_name(variant: str, number: int) -> str:
    return f"{variant}-{number}"


def _read_trials(path: Path) -> dict[str, float]:
    """Return the errors of finished trials by name."""
    import json

    found: dict[str, Any] = {}
    for file in (path.parent / "trials").glob("*.json"):
        found[file.stem] = json.loads(file.read_text(encoding="utf-8"))["error"]
    return found
