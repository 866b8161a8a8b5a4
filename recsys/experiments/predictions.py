"""What networks and baselines predict, and what they score, overall, by task and by part.

N rows, T tasks, U users of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from core_gates.errors import GatesError
from harness.evidence import Resamples, Row, Scores, SingleUnit, compare
from recsys.columns.canonical import canonical, keys_of, kind_of
from recsys.data.tables import RankingTables
from recsys.inputs import Batch
from recsys.metrics import (
    auc,
    gains_over_single,
    gxauc,
    mean_absolute_error,
    per_user_sums,
    standard_slices,
    xauc,
)
from recsys.metrics.probabilities import losses
from recsys.metrics.resampled import Slices, ratio, summed_log_loss, task_scores, user_resamples
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema

Probabilities = NDArray[np.float64]
ROWS = 8192
SUMMED, AUC = "summed log_loss", "auc"
GAIN, WORSE = "gain over single tasks", "tasks worse than alone"
AVERAGED = ", averaged"
"""End of the name of the mean prediction of the seeds of a method."""

ORACLE, TRUTH = "oracle", "truth_"
"""The method of the true probabilities, and the beginning of the columns that hold them."""

During = Callable[[str], AbstractContextManager[object]]
"""Returns a context around what takes long, given what is done, such as a progress."""

Each = Callable[[str, Iterable[Any]], Iterable[Any]]
"""Yields items one by one, given what is done with each, such as a progress."""

SLICES, COUNT = "slices", "test rows"
LOSS = "log-loss"


@torch.no_grad()
def probabilities(ranker: Ranker, rows: Batch) -> Probabilities:
    """Return the probabilities (N, T) of a network in evaluation mode."""
    ranker.eval()
    parts = []
    for start in range(0, len(rows), ROWS):
        some = rows.take(slice(start, start + ROWS))
        logits = ranker(some.sparse, some.dense, some.sequences)
        parts.append(logits.double().sigmoid().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def regression_rows(method: str, ranker: Ranker, rows: Batch) -> list[Row]:
    """Return how well a network orders and predicts each number, such as the play time.

    XAUC and its mean within users, weighted by rows, and the mean absolute error of the median, in
    the unit of the number; rows where a number does not count are left out. Nothing for a network
    without regressions.
    """
    if ranker.heads is None or rows.numbers is None:
        return []
    ranker.eval()
    v = ranker.inputs(rows.sparse, rows.dense, rows.sequences)
    guess = ranker.heads.numbers(ranker.outputs(v, ranker.ids(rows.sparse)), rows.dense).numpy()
    truth, made = ranker.heads.numbers(rows.numbers, rows.dense).numpy(), list[Row]()
    for place, regression in enumerate(ranker.heads.regressions):
        measured = ~np.isnan(truth[:, place])
        columns = guess[measured, place], truth[measured, place]
        within = gxauc(*columns, rows.user.numpy()[measured])
        error = mean_absolute_error(*columns, rows.weight.numpy()[measured])
        figures = {"xauc": xauc(*columns).value, "gxauc": within.weighted, "mae": error.value}
        made += [Row(method, regression.name, name, value) for name, value in figures.items()]
    return made


def check_finite(ranker: Ranker, rows: Batch) -> None:
    """Refuse a network that has diverged.

    Args:
        ranker: The network.
        rows: Rows that it must have finite predictions of.

    Raises:
        GatesError: A prediction is not finite.
    """
    predicted = probabilities(ranker, rows)
    if count := int((~np.isfinite(predicted)).sum()):
        raise GatesError(
            f"{count} of {predicted.size} predictions are not finite, so the training has diverged:"
            " lower model.learning_rate, or what contest.space allows"
        )


def summed_log_loss_of(rows: Batch, found: Probabilities) -> float:
    """Return the sum over tasks of the mean log-loss of predictions (N, T)."""
    score = scores_of(rows, found, ())[""]
    users = len(np.unique(rows.user.numpy()))
    return float(score(np.ones((1, users)))["log_loss"][0])


def scores_of(
    rows: Batch, found: Probabilities, tasks: Sequence[str], *, exact_auc: bool = False
) -> dict[str, Scores]:
    """Return the scores of predictions, for `harness.evidence.compare`.

    Args:
        rows: With labels, masks, weights and users.
        found: Probabilities (N, T).
        tasks: Names of the tasks.
        exact_auc: Whether intervals of the AUC are wanted, which cost rows × resamples.

    Returns:
        ``""`` for all tasks together, then each task by name.
    """
    labels, mask = rows.labels.numpy(), rows.mask.numpy()
    weight, user = rows.weight.numpy(), rows.user.numpy()
    scores: dict[str, Scores] = {
        "": summed_log_loss(labels, found, user, mask=mask, weights=weight)
    }
    for number, task in enumerate(tasks):
        columns = labels[:, number], found[:, number], user
        scores[task] = task_scores(
            *columns, mask=mask[:, number], weights=weight, exact_auc=exact_auc
        )
    return scores


def mean_auc(rows: Batch, per_seed: Sequence[Probabilities], task: int) -> float:
    """Return the exact AUC of a task, averaged over the predictions of several seeds."""
    seen = rows.mask[:, task].numpy()
    labels, weight = rows.labels[:, task].numpy()[seen], rows.weight.numpy()[seen]
    return float(
        np.mean([auc(predicted[seen, task], labels, weight).value for predicted in per_seed])
    )


def contest_rows(
    test: Batch,
    schema: FeatureSchema,
    found: Mapping[str, Sequence[Probabilities]],
    *,
    reference: str | None = None,
    single: str = "",
    exact_auc: bool = False,
    resamples: int = 1000,
    during: During = nullcontext,
    each: Each = lambda _, items: items,
) -> list[Row]:
    """Return the rows of all methods: summed log-loss with differences, then every task.

    Args:
        test: The N test rows.
        schema: Of the data.
        found: Method -> probabilities (N, T), one for each seed.
        reference: Method that is subtracted from all others; no differences by default.
        single: Method with a network for each task, over which gains are told; none by default.
        exact_auc: Whether AUC gets intervals and differences, which cost rows × resamples.
        resamples: Of the users.
        during: Shows that a long step is at work.
        each: Shows which method or task is at work.
    """
    tasks = schema.task_names
    draws = user_resamples(test.user.numpy(), resamples=resamples)
    scores = {
        m: [scores_of(test, predicted, tasks, exact_auc=exact_auc) for predicted in found[m]]
        for m in each("summing over users", found)
    }
    summed = {
        m: [named(task_scores_of_seed[""], SUMMED) for task_scores_of_seed in seed_scores]
        for m, seed_scores in scores.items()
    }
    with during("resampling users"):
        rows = compare(summed, draws, task="test", reference=reference)
        rows += category_rows(test, found, schema, draws, reference=reference)
    per_task: list[Row] = []
    for number, task in enumerate(each("resampling users", tasks)):
        of_task = {
            m: [scores_of_seed[task] for scores_of_seed in seed_scores]
            for m, seed_scores in scores.items()
        }
        against = reference if exact_auc else None
        per_task += compare(of_task, draws, task=task, reference=against)
        if not exact_auc:
            per_task += [
                Row(m, task, AUC, mean_auc(test, seed_predictions, number))
                for m, seed_predictions in found.items()
            ]
    categories = {task.name: task.category for task in schema.tasks}
    gains = gain_rows(per_task, single) if single else []
    return [*rows, *summary_rows(per_task, categories), *gains, *per_task]


def named(scores: Scores, name: str) -> Scores:
    """Return the log-loss of scores under another name."""
    return lambda drawn: {name: scores(drawn)["log_loss"]}


def oracle_of(
    tables: Sequence[pl.DataFrame], tasks: Sequence[str]
) -> dict[str, list[Probabilities]]:
    """Return the true probabilities (N, T) of rows as those of a method, where they are known.

    Args:
        tables: Rows, one table after the other.
        tasks: T names.
    """
    columns = [f"{TRUTH}{task}" for task in tasks]
    if not all(column in tables[0].columns for column in columns):
        return {}
    return {ORACLE: [np.concatenate([table.select(columns).to_numpy() for table in tables])]}


def gain_rows(per_task: Sequence[Row], single: str) -> list[Row]:
    """Return what every method gains over networks of single tasks, and the tasks that lose.

    The mean relative gain of AUC − ½, and the number of tasks whose AUC is lower: the seesaw.

    Args:
        per_task: Rows of tasks; differences are left out.
        single: Method with a network for each task.
    """
    areas: dict[str, dict[str, float]] = {}
    for row in per_task:
        if row.metric == AUC and not row.versus:
            areas.setdefault(row.method, {})[row.task] = row.value
    if single not in areas:
        return []
    rows = []
    for method, seed_areas in areas.items():
        if seed_areas.keys() != areas[single].keys():
            continue
        gains = gains_over_single(seed_areas, areas[single])
        rows += [
            Row(method, "test", GAIN, gains.mean, n=max(gains.tasks, 1)),
            Row(method, "test", WORSE, float(gains.worse), n=max(gains.tasks, 1)),
        ]
    return rows


def summary_rows(per_task: Sequence[Row], categories: Mapping[str, str]) -> list[Row]:
    """Return the mean AUC and GAUC of every method over the tasks of each category, AUC first.

    Args:
        per_task: Rows of tasks; differences are left out.
        categories: Task -> category.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in per_task:
        if row.metric in (AUC, "gauc") and not row.versus:
            key = row.method, row.metric, categories[row.task]
            values.setdefault(key, []).append(row.value)
    return [
        Row(method, "test", f"{metric} {category}", float(np.mean(numbers)))
        for (method, metric, category), numbers in sorted(values.items(), key=lambda v: v[0][1])
    ]


def category_rows(
    rows: Batch,
    found: Mapping[str, Sequence[Probabilities]],
    schema: FeatureSchema,
    draws: Resamples,
    *,
    reference: str | None = None,
) -> list[Row]:
    """Return the log-loss of all methods summed over the tasks of each category.

    Args:
        rows: The N test rows.
        found: Method -> probabilities (N, T) of each seed.
        schema: Whose tasks have categories.
        draws: Resamples of users.
        reference: Method that is subtracted from all others.

    Returns:
        Rows of the task ``test``, with the metric ``summed log_loss CATEGORY``; none where there
        is one category only.
    """
    labels, mask = rows.labels.numpy(), rows.mask.numpy()
    users, weights = rows.user.numpy(), rows.weight.numpy()
    made: list[Row] = []
    for category in schema.categories if len(schema.categories) > 1 else ():
        places = [k for k, task in enumerate(schema.tasks) if task.category == category]
        if not mask[:, places].any():
            continue

        def score(one: Probabilities, places: list[int] = places) -> Scores:
            truth, counted = labels[:, places], mask[:, places]
            return summed_log_loss(truth, one[:, places], users, mask=counted, weights=weights)

        scores = {
            method: [
                named(score(predicted), f"{SUMMED} {category}") for predicted in seed_predictions
            ]
            for method, seed_predictions in found.items()
        }
        made += compare(scores, draws, task="test", reference=reference)
    return made


def slices_of(tables: Sequence[RankingTables], random: str = "") -> dict[str, np.ndarray]:
    """Return the parts of the test rows of several splits, one split after the other (N,).

    Args:
        tables: A data set in each of its splits.
        random: Column that is not 0 where an item was shown at random; none if it is absent.

    Returns:
        See `recsys.metrics.standard_slices`; nothing for data without user or item.
    """
    schema = tables[0].schema
    if not schema.user or not schema.item:
        return {}
    slices = [_of_split(split, schema.user, schema.item, random) for split in tables]
    names = dict.fromkeys(name for split_slices in slices for name in split_slices)
    nothing = [np.zeros(len(split.test), dtype=bool) for split in tables]
    return {
        name: np.concatenate(
            [split_slices.get(name, no) for split_slices, no in zip(slices, nothing, strict=True)]
        )
        for name in names
    }


def slice_rows(
    rows: Batch,
    slices: Slices,
    found: Mapping[str, Sequence[Probabilities]],
    *,
    reference: str | None,
    resamples: int = 1000,
) -> list[Row]:
    """Return the summed log-loss of all methods on each part, and what they lose to the reference.

    Intervals are those of the users of the part; ``test rows`` counts its rows.

    Args:
        rows: Test rows.
        slices: Name of a part -> its rows (N,).
        found: Method -> predictions (N, T), one for each seed.
        reference: Method that all others are compared with.
        resamples: Of the intervals.
    """
    mask = rows.mask.numpy()
    weight = mask * rows.weight.double().numpy()[:, None]
    positive = rows.labels.numpy() == 1
    lost = {
        m: [losses(predicted, positive) * weight for predicted in seed_predictions]
        for m, seed_predictions in found.items()
    }
    users, made, counts = rows.user.numpy(), [], []
    for name, part in slices.items():
        metric, own_users = f"{LOSS}, {name}", users[part]
        mass = per_user_sums(own_users, weight[part])[1]
        scores = {
            m: [
                _summed(metric, per_user_sums(own_users, row_losses[part])[1], mass)
                for row_losses in seed_losses
            ]
            for m, seed_losses in lost.items()
        }
        draws = user_resamples(own_users, resamples=resamples)
        made += compare(scores, draws, task=SLICES, reference=reference)
        counts.append(Row(COUNT, SLICES, metric, int(part.sum()), n=draws.units))
    return [*made, *counts]


def _of_split(tables: RankingTables, user: str, item: str, random: str) -> dict[str, np.ndarray]:
    train, test = tables.train, tables.test
    train_users, users = _numbered(train[user], test[user])
    train_items, items = _numbered(train[item], test[item])
    shown = test[random].fill_null(0).to_numpy() != 0 if random in test.columns else None
    return standard_slices(
        users, items, train_users=train_users, train_items=train_items, random=shown
    )


def _numbered(train: pl.Series, test: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of the ids of both columns; a test row without an id is of none that is known.

    Missing ones of training rows share the number -1, those of test rows -2.
    """
    both = pl.concat([train, test])
    missing = keys_of(canonical(both, kind_of(both.name, both.dtype) or "integer"))[1]
    ranks = both.rank("dense").fill_null(0).cast(pl.Int64).to_numpy()
    first, count = np.where(missing, -1, ranks), len(train)
    return first[:count], np.where(missing, -2, ranks)[count:]


def _summed(metric: str, sums: np.ndarray, mass: np.ndarray) -> Scores:
    """Return the sum over tasks of the mean loss, from sums of losses and weights (U, T)."""
    counted = mass.sum(0) > 0
    scores = partial(_scores, metric, sums[:, counted], mass[:, counted])
    return SingleUnit(scores, [metric] if int(mass.any(1).sum()) == 1 else [])


def _scores(
    metric: str, sums: np.ndarray, mass: np.ndarray, drawn: np.ndarray
) -> dict[str, np.ndarray]:
    return {metric: ratio(drawn @ sums, drawn @ mass).sum(-1)}
