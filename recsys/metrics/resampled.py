"""Scores of named parts of a test set, under resampled users, for intervals and differences."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_at_least
from harness.evidence import Resamples, Scores, SingleUnit, single_of
from recsys.metrics.probabilities import (
    binary_rows,
    entropy,
    losses,
    numbered_users,
    probabilities,
    user_auc,
)

Slices = Mapping[str, np.ndarray]
"""Name of a part to its rows (N,), boolean."""


def standard_slices(
    users: ArrayLike,
    items: ArrayLike,
    *,
    train_users: ArrayLike,
    train_items: ArrayLike,
    random: ArrayLike | None = None,
    parts: int = 4,
) -> dict[str, np.ndarray]:
    """Return the parts that every ranker is judged on.

    Args:
        users: (N,) user of each test row.
        items: (N,) item of each test row.
        train_users: (M,) user of each training row.
        train_items: (M,) item of each training row.
        random: (N,) true where the item was shown at random, not chosen by a ranker.
        parts: Quantiles of activity (training rows of the user) and of exposure (training rows of
            the item); those without any are the new ones.

    Returns:
        ``new users``, ``known users``, ``new items``, ``known items``, ``activity 1/4`` (least
        active) to ``activity 4/4``, ``exposure 1/4`` to ``exposure 4/4``, and, if given,
        ``random exposure`` and ``ranked exposure``. Parts without a row are left out.

    Raises:
        GatesError: Lengths differ.
        ValueError: ``parts`` is below 1.
    """
    check_at_least(1, parts=parts)
    activity, exposure = counts_of(users, train_users), counts_of(items, train_items)
    if len(activity) != len(exposure):
        raise GatesError(f"{len(activity)} users and {len(exposure)} items, expected one per row")
    slices = {
        "new users": activity == 0,
        "known users": activity > 0,
        "new items": exposure == 0,
        "known items": exposure > 0,
        **quantile_slices("activity", activity, parts=parts, among=activity > 0),
        **quantile_slices("exposure", exposure, parts=parts, among=exposure > 0),
    }
    if random is not None:
        shown = np.asarray(random, dtype=bool)
        if shown.shape != activity.shape:
            raise GatesError(f"random has shape {shown.shape}, expected {activity.shape}")
        slices |= {"random exposure": shown, "ranked exposure": ~shown}
    return {name: rows for name, rows in slices.items() if rows.any()}


def counts_of(values: ArrayLike, among: ArrayLike) -> np.ndarray:
    """Return how often each value (N,) occurs among others (M,)."""
    distinct, counts = np.unique(np.asarray(among), return_counts=True)
    wanted = np.asarray(values)
    if not len(distinct):
        return np.zeros(wanted.shape, dtype=np.int64)
    place = np.minimum(np.searchsorted(distinct, wanted), len(distinct) - 1)
    return np.where(distinct[place] == wanted, counts[place], 0)


def quantile_slices(
    name: str,
    values: ArrayLike,
    *,
    parts: int = 4,
    among: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Return rows by quantile of a value, from the smallest; equal values share a part.

    Args:
        name: Of the value.
        values: (N,).
        parts: Number of parts.
        among: (N,) rows that are divided; all by default.
        names: Of the parts; ``name 1/4`` and so on by default.

    Raises:
        ValueError: There is not one name per part.
    """
    numbers = np.asarray(values, dtype=float)
    rows = np.ones(len(numbers), dtype=bool) if among is None else np.asarray(among, dtype=bool)
    if len(names) not in (0, parts):
        raise ValueError(f"{len(names)} names for {parts} parts: expected one per part")
    labels = names or [f"{name} {part + 1}/{parts}" for part in range(parts)]
    if not rows.any():
        return {}
    edges = np.quantile(numbers[rows], np.arange(1, parts) / parts)
    place = np.searchsorted(edges, numbers, side="left")
    return {label: rows & (place == part) for part, label in enumerate(labels)}


CELLS = 2_000_000  # weights of rows held at once


def user_resamples(
    users: ArrayLike, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Resamples:
    """Return resamples of the distinct users; every score of this file takes their weights.

    Args:
        users: (N,) user of each row, integers or strings.
        resamples: Number of resamples.
        level: Coverage of intervals.
        seed: Of the resampling.

    Raises:
        ValueError: There is no row, or no resample.
    """
    names = np.unique(np.asarray(users))
    return Resamples.clusters(names, resamples=resamples, level=level, seed=seed)


def per_user_sums(users: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct users (U,), ascending, and the sums of their rows (U, M).

    Args:
        users: (N,).
        values: (N, M), or (N,) for M = 1.

    Raises:
        GatesError: There is not one user per row.
    """
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    names, index = numbered_users(users, len(numbers))
    columns = [np.bincount(index, column, len(names)) for column in numbers.T]
    return names, np.stack(columns, 1)


def summed_log_loss(
    labels: ArrayLike,
    probs: ArrayLike,
    users: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    tasks: Sequence[str] = (),
) -> Scores:
    """Return ``log_loss``: the sum over tasks of the mean log-loss of the rows where each counts.

    Args:
        labels: (N, T), 0 or 1; anything where masked.
        probs: (N, T) predicted probabilities.
        users: (N,).
        mask: (N, T) true where a task counts; everywhere by default. A task without any row, or
            any of weight above 0, is left out.
        weights: (N,) sample weights; 1 by default.
        tasks: T names; with them the log-loss of each task is returned as well, under its name.

    Raises:
        GatesError: Shapes differ, or a label or probability is none.
    """
    truth, guess = np.asarray(labels), np.asarray(probs, dtype=float)
    if truth.ndim != 2 or truth.shape != guess.shape:
        raise GatesError(f"labels {truth.shape} and probs {guess.shape} must be (N, T) both")
    counted = np.ones(truth.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if counted.shape != truth.shape:
        raise GatesError(f"mask has shape {counted.shape}, expected {truth.shape}")
    if len(tasks) not in (0, truth.shape[1]):
        raise GatesError(f"{len(tasks)} names for {truth.shape[1]} tasks, expected one for each")
    given = np.ones(len(truth)) if weights is None else np.asarray(weights, dtype=float)
    if given.shape != truth.shape[:1]:
        raise GatesError(f"weights have shape {given.shape}, expected {truth.shape[:1]}")
    scored_tasks = [task for task in range(truth.shape[1]) if counted[given != 0, task].any()]
    if not scored_tasks:
        raise GatesError("no task has a row that counts")
    parts = [
        _loss_sums(truth[:, task], guess[:, task], users, counted[:, task], weights)
        for task in scored_tasks
    ]
    names = [tasks[task] for task in scored_tasks] if tasks else []
    sums = np.stack(parts, 1)  # (U, T, 2)

    def scores(drawn: np.ndarray) -> dict[str, np.ndarray]:
        total, mass = np.moveaxis(np.tensordot(drawn, sums, 1), -1, 0)
        losses = ratio(total, mass)
        return {"log_loss": losses.sum(-1)} | dict(zip(names, losses.T, strict=bool(names)))

    counting = sums[..., 1] != 0  # (U, T)
    single = {*_alone(counting.any(1), ["log_loss"])}
    for name, task_counts in zip(names, counting.T, strict=bool(names)):
        single.update(_alone(task_counts, [name]))
    return SingleUnit(scores, single)


def task_scores(
    labels: ArrayLike,
    probs: ArrayLike,
    users: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    exact_auc: bool = True,
) -> Scores:
    """Return the scores of one task, for ``compare``.

    ``log_loss``; ``ne``, the normalized entropy; ``pcoc``; ``gauc``, weighted by rows; and
    ``gauc_mean`` over users; and ``auc``.

    Args:
        labels: (N,), 0 or 1; anything where masked.
        probs: (N,) predicted probabilities.
        users: (N,).
        mask: (N,) true where the task counts; everywhere by default.
        weights: (N,) sample weights; 1 by default.
        exact_auc: Whether ``auc`` is among them: it costs rows × resamples.

    Raises:
        GatesError: Lengths differ, or a label or probability is none.
    """
    truth, guess = np.asarray(labels), np.asarray(probs, dtype=float)
    counted = np.ones(truth.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if not truth.shape == guess.shape == counted.shape or truth.ndim != 1:
        raise GatesError(
            f"labels {truth.shape}, probs {guess.shape} and mask {counted.shape} must be (N,)"
        )
    names, index = numbered_users(users, len(truth))
    given = np.ones(len(truth)) if weights is None else np.asarray(weights, dtype=float)
    rows = probabilities(guess[counted]), truth[counted], given[counted]
    means = _mean_scores(*rows, index[counted], len(names))
    areas = _area_scores(*rows, index[counted], len(names))
    if not exact_auc:
        return combined(means, areas)
    return combined(means, areas, auc_scores(guess, truth, index, mask=counted, weights=given))


def auc_scores(
    scores: ArrayLike,
    labels: ArrayLike,
    users: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Scores:
    """Return ``auc``, exact under the weights of every resample; rows are sorted once.

    Args:
        scores: (N,).
        labels: (N,), 0 or 1; anything where masked.
        users: (N,).
        mask: (N,) true where the task counts; everywhere by default.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a label is neither 0 nor 1.
    """
    truth, values = np.asarray(labels), np.asarray(scores, dtype=float)
    _, index = numbered_users(users, len(truth))
    counted = np.ones(len(truth), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    given = np.ones(len(truth)) if weights is None else np.asarray(weights, dtype=float)
    return _auc_scores(values[counted], truth[counted], given[counted], index[counted])


def combined(*scores: Scores) -> Scores:
    """Return the scores of several functions as one."""

    def together(drawn: np.ndarray) -> Mapping[str, np.ndarray]:
        return {name: value for score in scores for name, value in score(drawn).items()}

    return SingleUnit(together, frozenset[str]().union(*map(single_of, scores)))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return a quotient, NaN where the divisor is 0."""
    none = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.divide(above, below, out=none, where=below != 0)


def _loss_sums(
    truth: np.ndarray,
    guess: np.ndarray,
    users: ArrayLike,
    counted: np.ndarray,
    weights: ArrayLike | None,
) -> np.ndarray:
    """Return the summed loss and the weight of every user (U, 2)."""
    given = np.ones(len(truth)) if weights is None else np.asarray(weights, dtype=float)
    _, positive, kept = binary_rows(guess[counted], truth[counted], given[counted])
    table = np.zeros((len(truth), 2))
    table[counted, 0] = losses(probabilities(guess[counted]), positive) * kept
    table[counted, 1] = kept
    return per_user_sums(users, table)[1]


def _mean_scores(
    guess: np.ndarray, truth: np.ndarray, given: np.ndarray, index: np.ndarray, size: int
) -> Scores:
    guess, positive, given = binary_rows(guess, truth, given)
    columns = (losses(guess, positive) * given, given, given * positive, given * guess)
    sums = np.stack([np.bincount(index, column, size) for column in columns], 1)

    def scores(drawn: np.ndarray) -> dict[str, np.ndarray]:
        loss, mass, positives, predicted = np.moveaxis(drawn @ sums, -1, 0)
        mean, base = ratio(loss, mass), entropy(ratio(positives, mass))
        return {
            "log_loss": mean,
            "ne": ratio(mean, base),
            "pcoc": ratio(predicted, positives),
        }

    return SingleUnit(scores, _alone(sums[:, 1] != 0, ["log_loss", "ne", "pcoc"]))


def _area_scores(
    guess: np.ndarray, truth: np.ndarray, given: np.ndarray, index: np.ndarray, size: int
) -> Scores:
    areas_of_users = user_auc(guess, truth, index, given)
    defined = ~np.isnan(areas_of_users.auc)
    sums = np.zeros((size, 4))
    areas, weight = areas_of_users.auc[defined], areas_of_users.weight[defined]
    sums[areas_of_users.users[defined]] = np.stack(
        (areas * weight, weight, areas, np.ones(len(areas))), 1
    )

    def scores(drawn: np.ndarray) -> dict[str, np.ndarray]:
        weighted, mass, plain, users = np.moveaxis(drawn @ sums, -1, 0)
        return {"gauc": ratio(weighted, mass), "gauc_mean": ratio(plain, users)}

    return SingleUnit(scores, _alone(defined, ["gauc", "gauc_mean"]))


def _auc_scores(
    guess: np.ndarray, truth: np.ndarray, given: np.ndarray, index: np.ndarray
) -> Scores:
    guess, positive, given = binary_rows(guess, truth, given)
    order = np.argsort(guess)
    guess, positive, given, owner = guess[order], positive[order], given[order], index[order]
    negatives = guess[~positive]
    below = np.searchsorted(negatives, guess[positive], side="left")
    until = np.searchsorted(negatives, guess[positive], side="right")

    def scores(drawn: np.ndarray) -> dict[str, np.ndarray]:
        areas = np.full(len(drawn), np.nan)
        step = max(1, CELLS // max(len(guess), 1))
        for start in range(0, len(drawn), step):
            weights = np.ascontiguousarray(drawn[start : start + step].T)  # (U, R)
            positive_weight = weights[owner[positive]] * given[positive, None]
            other = np.zeros((len(negatives) + 1, weights.shape[1]))
            np.multiply(weights[owner[~positive]], given[~positive, None], out=other[1:])
            np.cumsum(other, axis=0, out=other)
            lost = other[below]
            lost += other[until]
            wins = np.einsum("pr,pr->r", positive_weight, lost) / 2
            areas[start : start + step] = ratio(wins, positive_weight.sum(0) * other[-1])
        return {"auc": areas}

    users = np.unique(owner[given != 0])
    return SingleUnit(scores, _alone(np.ones(len(users), dtype=bool), ["auc"]))


def _alone(counting: np.ndarray, names: Collection[str]) -> Collection[str]:
    """Return the names if one user alone counts (U,), else none."""
    return names if counting.sum() == 1 else ()
