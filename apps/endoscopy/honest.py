"""The honest table: kinds of gates and the plain network, at one budget of steps and of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from apps.endoscopy.scoring import OTHERS, keep_table
from apps.endoscopy.training import decisive, make_ready, piece_of, trained
from core_gates.errors import GatesError
from endoscopy.bundles.building import CARRIED, part_predictions, rounded_bundle
from endoscopy.data.datamodule import Part
from endoscopy.evaluation.baselines import baseline_predictions
from endoscopy.evaluation.honest_table import REFERENCE, HonestScores
from endoscopy.experiments.settings import rendering_settings, split_settings
from endoscopy.experiments.sizers import Sizers, Training, taking_part
from endoscopy.metrics import object_table
from harness.experiment import Choice, Job, Piece, Run, Store, Table

RUNS, BASELINES = "runs", "baselines"
HONEST, TUNING = "honest.parquet", "tuning.parquet"
KEPT = ("variant", "unique_id", "patient", "gt", "censored", "predicted_mm")

Trials = Mapping[str, Sequence[Mapping[str, float]]]


class Budget(NamedTuple):
    """What is compared, and what every variant gets.

    Attributes:
        variants: Names; ``plain`` is what the others are compared with.
        seeds: Seeds of draws, weights and order, at every size.
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
        """Refuse a table that nobody can compare.

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

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings of every training: so many steps, of which the last weights are kept."""
        none = dict.fromkeys(("trainer.max_epochs", "checkpoint.monitor", "checkpoint.mode"))
        return {"trainer.max_steps": self.steps, **none}

    def spaces(self, sizers: Sizers) -> dict[str, list[dict[str, float]]]:
        """Return the settings that are tried."""
        return {
            name: [{**one, **sizers.version(name)} for one in self.trials[name]]
            for name in self.variants
            if name in self.trials
        }

    def pieces(self, run: Run, sizers: Sizers, chosen: Mapping[str, Choice]) -> list[Piece]:
        """Return all trainings."""
        return [
            piece_of(
                run,
                sizers,
                Training(variant, seed, size),
                **self.fixed | dict(chosen[variant].setting if variant in chosen else {}),
            )
            for size in self.sizes
            for seed in self.seeds
            for variant in self.variants
        ]

    def baselines(self, sizers: Sizers) -> list[Piece]:
        """Return what the constant and the apparent area are fitted to."""
        settings = split_settings(sizers.datamodule)
        if sizers.rendering is not None and "synthetic" in sizers.datamodule.sources:
            settings |= rendering_settings(sizers.rendering.config)
        return [
            Piece(BASELINES, seed, {"n": n}, settings) for n in self.sizes for seed in self.seeds
        ]


def score_honest(run: Run, sizers: Sizers, budget: Budget) -> Path:
    """Tune, train and predict what is missing, and write and print the comparison."""
    budget.check()
    run.settings = decisive(run.settings, sizers)
    run.only = (*run.only, BASELINES) if run.only else ()
    epochs = partial(_epochs, sizers=sizers)
    ready = partial(make_ready, sizers)
    chosen = run.tune(
        budget.spaces(sizers),
        partial(trial, sizers=sizers),
        trials=len(budget.trials.get(REFERENCE, ())) or 1,
        ticks=epochs,
        prepare=ready,
        objects=budget.trial_objects,
        **budget.fixed,
    )
    store: Store[pd.DataFrame] = run.store(RUNS, Table())
    wanted = budget.pieces(run, sizers, chosen)
    work = partial(predicted, sizers=sizers)
    found = run.obtain(store, wanted, work, ticks=epochs, prepare=ready)
    work = partial(baselines, sizers=sizers)
    fitted = run.obtain(store, budget.baselines(sizers), work, prepare=ready)
    lacking = {piece.method for piece in set(wanted) - set(found)}
    complete = [piece for piece in found if piece.method not in lacking]
    if not complete or len(fitted) < len(budget.sizes) * len(budget.seeds):
        raise GatesError("no training is there to be compared: evaluate without --quick")
    scores = HonestScores(_read(store, complete), _read(store, fitted), sizers.module.cut_offs)
    keep_table(scores.table, run.folder / HONEST)
    keep_table(tuning_table(chosen), run.folder / TUNING)
    return run.finish(
        scores.rows(),
        seeds=budget.seeds,
        data=sizers.datamodule.digest(),
        headline=scores.headline,
        notes=[f"{budget.steps} optimizer steps of every training."],
        others=OTHERS,
    )


def predicted(piece: Piece, job: Job, *, sizers: Sizers) -> pd.DataFrame:
    """Return what a newly trained network predicts for the test objects."""
    return _kept(_objects(piece, job, sizers, "test"))


def trial(piece: Piece, job: Job, *, sizers: Sizers) -> dict[str, float]:
    """Return the mean relative error of the validation objects."""
    objects = _objects(piece, job, sizers, "validation")
    error = (np.log(objects["predicted_mm"]) - np.log(objects["gt"])).abs().mean()
    return {"score": float(error)}


def baselines(piece: Piece, job: Job, *, sizers: Sizers) -> pd.DataFrame:
    """Return what a constant and the apparent area predict for the test objects."""
    data = sizers.data(Training(seed=piece.seed or 0, objects=int(piece.keys["n"])))
    frames = data.load().frames
    test = frames.iloc[data.evaluation_rows("test")]
    test = test[[name for name in CARRIED if name in test]]
    found = baseline_predictions(frames.iloc[data.rows("train")], test)
    job.note(objects=data.training_objects())
    job.tick()
    tables = [object_table(table).assign(variant=name) for name, table in found.items()]
    return _kept(pd.concat(tables, ignore_index=True))


def tuning_table(chosen: Mapping[str, Choice]) -> pd.DataFrame | None:
    """Return the chosen settings, their scores and the number of trials; None without trials."""
    rows = [
        {
            "variant": variant,
            **{n: value for n, value in choice.setting.items() if n != "version"},
            "error": float(np.nanmin([one["score"] for one in choice.trials])),
            "trials": len(choice.trials),
        }
        for variant, choice in chosen.items()
        if choice.trials
    ]
    return pd.DataFrame(rows) if rows else None


def _objects(piece: Piece, job: Job, sizers: Sizers, part: Part) -> pd.DataFrame:
    module, data = trained(piece, job, sizers, max_epochs=_epochs(piece, sizers=sizers))
    return object_table(part_predictions(rounded_bundle(module, data), data, part))


def _epochs(piece: Piece, *, sizers: Sizers) -> int:
    """Return the epochs that give the number of steps, rounded up."""
    objects = int(piece.keys.get("n", piece.get("objects")))
    return sizers.epochs(piece["trainer.max_steps"], objects)


def _kept(found: pd.DataFrame) -> pd.DataFrame:
    table = found[[name for name in KEPT if name in found]]
    return table.assign(predicted_mm=table["predicted_mm"].astype(np.float32))


def _read(store: Store[pd.DataFrame], pieces: Sequence[Piece]) -> pd.DataFrame:
    """Return the predictions of pieces with variant, train_objects and seed."""
    tables = []
    for piece in pieces:
        table = store.load(piece)
        if "variant" not in table:
            table = table.assign(variant=piece.method)
        tables.append(table.assign(train_objects=int(piece.keys["n"]), seed=piece.seed))
    return pd.concat(tables, ignore_index=True)
