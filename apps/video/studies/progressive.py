"""Train a day, test the next, grow: next to a model trained once, and to one trained from scratch.

N rows, T tasks.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import polars as pl
import torch

from apps.video.comparison import Study, trainer_options
from core_gates.errors import GatesError, check_at_least
from harness.evidence import Bar, Row, compare
from harness.experiment import Job, Piece, Run
from harness.runs.callbacks import load_weights
from recsys.daily import DailyState, continue_from, restore
from recsys.data.datamodule import TableDataModule
from recsys.data.tables import RankingTables
from recsys.experiments import (
    AUC,
    SUMMED,
    Contest,
    Places,
    Probabilities,
    data_of,
    mean_auc,
    module_of,
    named,
    oracle_of,
    probabilities,
    require_tables,
    scores_of,
    summary_rows,
)
from recsys.inputs import Batch
from recsys.metrics import counts_of, user_resamples
from recsys.ranker_module import MultiTaskModule
from recsys.transform import FeatureTransform

PROGRESSIVE, ONCE, LONGER, RETRAINED = "progressive", "once", "longer", "retrained"
METHODS = (PROGRESSIVE, ONCE, LONGER, RETRAINED)
STATES = "states"
RESAMPLES = 1000
DAY = "day"


class States:
    """The form of what a day leaves to the next one."""

    def save(self, folder: Path, result: DailyState) -> None:
        """Write weights, state of the optimizers, and transform."""
        result.save(folder)

    def load(self, folder: Path) -> DailyState:
        """Read what `save` wrote.

        Raises:
            GatesError: A file is missing or damaged.
        """
        return DailyState.load(folder)


class Days(NamedTuple):
    """The rows of a log by day.

    Attributes:
        first: Rows before the first test day.
        days: Rows of each test day, in order.
        schema: Data module of the configuration, with the schema and the sizes of batches.
    """

    first: pl.DataFrame
    days: dict[int, pl.DataFrame]
    data: TableDataModule

    def until(self, day: int) -> pl.DataFrame:
        """Return all rows before a day."""
        return pl.concat(
            [self.first, *(rows for number, rows in self.days.items() if number < day)]
        )


class ProgressiveStudy(Study):
    """A network that is trained further on each test day, after that day has tested it.

    ``once`` is trained on the days before the first test day. ``progressive`` begins as ``once``;
    every day its vocabularies and tables get rows for new values and it makes a few passes over the
    rows of the day, its optimizers continuing where they were. ``longer`` is ``once`` with as many
    steps as ``progressive`` has made at the end, so that freshness is told from training longer.
    ``retrained`` is trained from scratch every day, on all rows before it.

    Args:
        day: Column of the day, a whole number that grows with time.
        epochs: Passes of ``once`` and ``retrained``, and of ``progressive`` before the first day.
        daily_epochs: Passes of ``progressive`` over the rows of a day.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(self, day: str = "date", epochs: int = 3, daily_epochs: int = 1) -> None:
        check_at_least(1, epochs=epochs, daily_epochs=daily_epochs)
        self.day, self.epochs, self.daily_epochs = day, epochs, daily_epochs

    def finish(
        self, run: Run, contest: Contest, seeds: Sequence[int], places: Mapping[str, str]
    ) -> None:
        """Train what is missing, day by day, and write ``scores.json``.

        Raises:
            GatesError: There is no such column, or there are fewer than two test days.
        """
        del contest
        days = days_of({**run.settings, **places}, self.day)
        states = self._states(run, seeds, days, places)
        predictions = {
            m: [_predicted(s, days, run.settings) for s in seed_states]
            for m, seed_states in states.items()
        }
        truth = oracle_of(list(days.days.values()), days.data.schema.task_names)
        rows = score(predictions | truth, days) if predictions else []
        gaps = {r.method: r for r in rows if r.versus == PROGRESSIVE and r.task == "test"}
        bars = [
            Bar(f"{SUMMED} of {method} − {PROGRESSIVE}, lower end", gaps[method].low, ">=", 0.0)
            for method in (ONCE, LONGER)
            if method in gaps
        ]
        losses = {
            r.method: r.value for r in rows if (r.task, r.metric, r.versus) == ("test", SUMMED, "")
        }
        found_losses = ", ".join(f"{m} {losses[m]:.3f}" for m in METHODS if m in losses)
        run.finish(
            rows,
            bars,
            seeds=seeds,
            data=days.data.digest(),
            metrics=(SUMMED, *(f"auc {c}" for c in days.data.schema.categories)),
            headline=f"Summed log-loss of {len(days.days)} days: {found_losses}.",
            notes=(
                f"{ONCE} knows the {len(days.first):,} rows before the first test day",
                *days.data.notes,
            ),
        )

    def _states(
        self, run: Run, seeds: Sequence[int], days: Days, places: Places
    ) -> dict[str, list[dict[int, DailyState]]]:
        """Return of each method and seed the state that every test day is predicted by."""
        store, order = run.store(STATES, States()), list(days.days)
        passes: dict[str, Any] = {"study.day": self.day, "study.epochs": self.epochs}
        further = self.daily_epochs * sum(len(days.days[day]) for day in order[:-1])
        many = passes | {"study.epochs": self.epochs + math.ceil(further / len(days.first))}
        once = [run.piece(ONCE, seed, **passes) for seed in seeds]
        longer = [run.piece(LONGER, seed, **many) for seed in seeds]
        train = partial(train_from_scratch, places=places)
        made = run.obtain(store, [*once, *longer], train, ticks=int(many["study.epochs"]))
        if len(made) < len(once) + len(longer):
            return {}
        trained_once = [store.load(piece) for piece in once]
        states_of = {
            ONCE: [dict.fromkeys(order, state) for state in trained_once],
            LONGER: [dict.fromkeys(order, store.load(piece)) for piece in longer],
            PROGRESSIVE: [{order[0]: state} for state in trained_once],
            RETRAINED: [{order[0]: state} for state in trained_once],
        }
        last = once
        for day, after in pairwise(order):
            pieces = [
                run.piece(PROGRESSIVE, piece.seed, {DAY: day}, **passes, start=piece.fingerprint,
                          **{"study.daily_epochs": self.daily_epochs})
                for piece in last
            ]  # fmt: skip
            before = {p.fingerprint: str(store.find(q)) for p, q in zip(pieces, last, strict=True)}
            work = partial(train_day, places=places, before=before)
            if len(run.obtain(store, pieces, work, ticks=self.daily_epochs)) < len(pieces):
                break
            for seed_states, piece in zip(states_of[PROGRESSIVE], pieces, strict=True):
                seed_states[after] = store.load(piece)
            last = pieces
        again = {
            (seed, day): run.piece(RETRAINED, seed, {DAY: day}, **passes)
            for seed in seeds
            for day in order[1:]
        }
        kept = set(run.obtain(store, again.values(), train, ticks=self.epochs))
        for seed_states, seed in zip(states_of[RETRAINED], seeds, strict=True):
            seed_states |= {
                d: store.load(p) for (s, d), p in again.items() if s == seed and p in kept
            }
        whole = {
            m: [seed_states for seed_states in all_ if len(seed_states) == len(order)]
            for m, all_ in states_of.items()
        }
        return {
            method: method_states
            for method, method_states in whole.items()
            if len(method_states) == len(seeds)
        }


def days_of(settings: Mapping[str, Any], column: str) -> Days:
    """Return the rows of a configuration by day.

    Raises:
        GatesError: There is no such column, there are fewer than two test days, or the rows are a
            stream.
    """
    data = data_of({n: v for n, v in settings.items() if n.startswith("data.")})
    require_tables(data, "this study needs", "set data.source to one that reads tables")
    tables = data.tables
    if column not in tables.test.columns:
        raise GatesError(
            f"the rows have no column {column!r} of the day: name one in evaluate.study"
        )
    days = tables.test.partition_by(column, as_dict=True, maintain_order=True)
    if len(days) < 2:
        raise GatesError(f"there is {len(days)} test day, but a chain of days needs two or more")
    return Days(
        pl.concat([tables.train, tables.validation]),
        {int(key[0]): days[key] for key in sorted(days)},
        data,
    )


def train_from_scratch(piece: Piece, job: Job, places: Places) -> DailyState:
    """Train on all rows before the day of a piece, before the first test day if it has none."""
    L.seed_everything(piece.seed, verbose=False)
    days = days_of({**piece.settings, **places}, piece["study.day"])
    rows = days.until(int(piece.keys[DAY])) if DAY in piece.keys else days.first
    transform = FeatureTransform(days.data.tables.schema, days.data.tables.missing).fit(rows)
    module = module_of(piece.settings)
    module.build(transform)
    return _trained(piece, job, module, days, rows, transform, int(piece["study.epochs"]))


def train_day(piece: Piece, job: Job, places: Places, before: Mapping[str, str]) -> DailyState:
    """Grow the state of the day before by the rows of the day of a piece, and train on them."""
    L.seed_everything(piece.seed, verbose=False)
    days = days_of({**piece.settings, **places}, piece["study.day"])
    rows = days.days[int(piece.keys[DAY])]
    module = module_of(piece.settings)
    state = DailyState.load(Path(before[piece.fingerprint]))
    transform = continue_from(module, state, rows)
    return _trained(piece, job, module, days, rows, transform, int(piece["study.daily_epochs"]))


def score(found: Mapping[str, Sequence[Probabilities]], days: Days) -> list[Row]:
    """Return the rows of all methods: over all test rows, new users and videos, and by day.

    A user or video is *new* without a row before the day, and *later* if its first row came after
    those that ``once`` was trained on, but before the day.

    Args:
        found: Method -> predictions (N, T) of all test rows, one for each seed.
        days: The rows.
    """
    transform = FeatureTransform(days.data.tables.schema, days.data.tables.missing).fit(days.first)
    test = Batch.cat([transform.batch(rows) for rows in days.days.values()])
    rows = []
    for name, chosen in {"test": np.ones(len(test), bool), **slices_of(days)}.items():
        if not chosen.any():
            continue
        part = test.take(torch.from_numpy(chosen))
        metric = f"{SUMMED} of a day" if name.startswith(DAY) else SUMMED
        summed = {
            m: [
                named(scores_of(part, predicted[chosen], ())[""], metric)
                for predicted in seed_predictions
            ]
            for m, seed_predictions in found.items()
        }
        draws = user_resamples(part.user.numpy(), resamples=RESAMPLES)
        reference = PROGRESSIVE if PROGRESSIVE in found else None
        rows += compare(summed, draws, task=name, reference=reference)
    tasks = days.data.schema.tasks
    per_task = [
        Row(method, task.name, AUC, mean_auc(test, seed_predictions, number))
        for method, seed_predictions in found.items()
        for number, task in enumerate(tasks)
    ]
    return [*rows, *summary_rows(per_task, {t.name: t.category for t in tasks}), *per_task]


def slices_of(days: Days) -> dict[str, np.ndarray]:
    """Return the test rows (N,) of new and later users and videos, and of each day."""
    schema, slices = days.data.schema, dict[str, np.ndarray]()
    for what, column in (("users", schema.user), ("videos", schema.item)):
        first = days.first[column].to_numpy()
        new, later = [], []
        for day, rows in days.days.items():
            values = rows[column].to_numpy()
            unseen = counts_of(values, days.until(day)[column].to_numpy()) == 0
            new.append(unseen)
            later.append(~unseen & (counts_of(values, first) == 0))
        slices |= {f"new {what}": np.concatenate(new), f"later {what}": np.concatenate(later)}
    number = np.repeat(np.arange(len(days.days)), [len(rows) for rows in days.days.values()])
    return slices | {f"day {k + 1}": number == k for k in range(len(days.days))}


def _trained(
    piece: Piece,
    job: Job,
    module: MultiTaskModule,
    days: Days,
    rows: pl.DataFrame,
    transform: FeatureTransform,
    epochs: int,
) -> DailyState:
    """Train a module for some passes over rows; nothing is validated, the last weights count."""
    few = rows.head(2)
    tables = RankingTables("days", transform.schema, rows, few, rows.clear())
    like = days.data
    seed = piece.seed or 0
    data = TableDataModule(
        tables, like.batch_size, order=like.order, seed=seed, transform=transform
    )
    job.note(objects=data.training_objects())
    options = trainer_options(piece) | {"max_epochs": epochs, "limit_val_batches": 0}
    job.fit(module, data, **options)
    assert job.last is not None
    optimizer = load_weights(job.last)["optimizer_states"][0]
    return DailyState.of(module, optimizer, transform)


def _predicted(
    states: Mapping[int, DailyState], days: Days, settings: Mapping[str, Any]
) -> Probabilities:
    """Return the predictions (N, T) of all test rows, each day by its state."""
    parts = []
    for day, rows in days.days.items():
        state = states[day]
        module = restore(module_of(settings), state)
        parts.append(probabilities(module.served(intercepts=False), state.transform.batch(rows)))
    return np.concatenate(parts)
