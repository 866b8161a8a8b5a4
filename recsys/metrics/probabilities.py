"""Scores of probabilities: areas under the ROC curve, log-loss, and whether they come true."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_at_least


class Measured(NamedTuple):
    """A figure, or the reason why there is none.

    Attributes:
        value: The figure; NaN where it is not defined.
        reason: Why it is not defined, for example ``no positive row``; else empty.
    """

    value: float
    reason: str = ""


def binary_rows(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores (float64), labels (bool) and weights (float64), each (N,).

    Args:
        scores: (N,), larger for likelier positives.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, a score is NaN, a label is neither 0 nor 1, or a weight is
            negative or not finite.
    """
    values, truth = _column("scores", scores), np.asarray(labels)
    given = np.ones(len(values)) if weights is None else _column("weights", weights)
    if not values.shape == truth.shape == given.shape:
        raise GatesError(
            f"scores {values.shape}, labels {truth.shape} and weights {given.shape} must have one "
            "length"
        )
    if unknown := int(np.isnan(values).sum()):
        raise GatesError(f"{unknown} of {values.size} scores are NaN; leave out rows without one")
    if truth.dtype != bool:
        positive = truth == 1
        if wrong := int((~positive & (truth != 0)).sum()):
            raise GatesError(
                f"{wrong} of {truth.size} labels are neither 0 nor 1; mask rows without a label"
            )
        truth = positive
    if not (np.isfinite(given) & (given >= 0)).all():
        raise GatesError("weights must be finite and not negative")
    return values, truth, given


def probabilities(probs: np.ndarray) -> np.ndarray:
    """Return the probabilities, if they are.

    Raises:
        GatesError: One lies outside of [0, 1].
    """
    if probs.size and not (probs.min() >= 0 and probs.max() <= 1):
        raise GatesError(
            f"probabilities lie in [0, 1], found {probs.min():.4g} to {probs.max():.4g}; apply the "
            "sigmoid to logits first"
        )
    return probs


def missing_class(positive: float, negative: float) -> str:
    """Return why a ranking of two classes is not defined; empty where it is.

    Args:
        positive: Weight of the positive rows.
        negative: Weight of the negative rows.
    """
    if positive > 0 and negative > 0:
        return ""
    if positive == negative == 0:
        return "no row"
    return "no positive row" if positive == 0 else "no negative row"


def _column(name: str, values: ArrayLike) -> np.ndarray:
    column = np.asarray(values, dtype=float)
    if column.ndim != 1:
        raise GatesError(f"{name} have shape {column.shape}, expected one per row (N,)")
    return column


def auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Measured:
    """Return the probability that a positive row scores above a negative one, ties counting half.

    Exact, by one sort: O(N log N).

    Args:
        scores: (N,).
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Returns:
        The area, NaN with the reason where one of the two classes has no weight.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a label is neither 0 nor 1.
    """
    values, positive, given = binary_rows(scores, labels, weights)
    order = np.argsort(values)
    values, positive, given = values[order], positive[order], given[order]
    negatives = np.where(positive, 0.0, given)
    total = float(given[positive].sum()), float(negatives.sum())
    if reason := missing_class(*total):
        return Measured(float("nan"), reason)
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    starts = np.concatenate(([0], starts))
    tied = np.add.reduceat(negatives, starts)
    positive_weight = np.add.reduceat(np.where(positive, given, 0.0), starts)
    wins = positive_weight @ (tied.cumsum() - tied / 2)
    return Measured(float(wins / (total[0] * total[1])))


class GroupedAUC(NamedTuple):
    """The mean AUC of users, over those with rows of both classes.

    Attributes:
        weighted: Σ n_u AUC_u / Σ n_u, n_u the rows (or weight) of a user (Zhu et al., 2017; HoME,
            arXiv 2408.05430).
        mean: Every user counts the same (TorchEasyRec's ``GroupedAUC``).
        users: Users with both classes.
        excluded: Users without.
        reason: Why there is no value; else empty.
    """

    weighted: float
    mean: float
    users: int
    excluded: int
    reason: str = ""


class UserAUC(NamedTuple):
    """The AUC of every user, the moments that grouped AUC is made of.

    Attributes:
        users: (U,) users, ascending.
        auc: (U,), NaN where a user lacks one of the classes.
        weight: (U,) rows of each, or their weight.
    """

    users: np.ndarray
    auc: np.ndarray
    weight: np.ndarray


def gauc(
    scores: ArrayLike, labels: ArrayLike, users: ArrayLike, weights: ArrayLike | None = None
) -> GroupedAUC:
    """Return the grouped AUC in both conventions; O(N log N), without a loop over users.

    Args:
        scores: (N,).
        labels: (N,), 0 or 1.
        users: (N,) user of each row, integers or strings.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a label is neither 0 nor 1.
    """
    return grouped(user_auc(scores, labels, users, weights))


def grouped(found: UserAUC) -> GroupedAUC:
    """Return the mean over users, weighted and not."""
    defined = ~np.isnan(found.auc)
    count, excluded = int(defined.sum()), int((~defined).sum())
    if not count:
        return GroupedAUC(float("nan"), float("nan"), 0, excluded, "no user has both classes")
    areas, weight = found.auc[defined], found.weight[defined]
    weighted = float(areas @ weight / weight.sum())
    return GroupedAUC(weighted, float(areas.mean()), count, excluded)


def user_auc(
    scores: ArrayLike, labels: ArrayLike, users: ArrayLike, weights: ArrayLike | None = None
) -> UserAUC:
    """Return the AUC and the weight of every user; see `gauc`."""
    values, positive, given = binary_rows(scores, labels, weights)
    names, index = numbered_users(users, len(values))
    order = np.argsort(values)
    order = order[np.argsort(index[order], kind="stable")]
    values, positive, given, owner = values[order], positive[order], given[order], index[order]
    first = np.ones(len(values), dtype=bool)
    first[1:] = (values[1:] != values[:-1]) | (owner[1:] != owner[:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return UserAUC(names, np.zeros(0), np.zeros(0))
    positive_weight = np.add.reduceat(np.where(positive, given, 0.0), starts)
    tied = np.add.reduceat(np.where(positive, 0.0, given), starts)
    owner = owner[starts]
    size = len(names)
    positives = np.bincount(owner, positive_weight, size)
    negatives = np.bincount(owner, tied, size)
    before = np.concatenate(([0.0], negatives.cumsum()[:-1]))[owner]  # those of earlier users
    wins = np.bincount(owner, positive_weight * (tied.cumsum() - tied / 2 - before), size)
    pairs = positives * negatives
    areas = np.divide(wins, pairs, out=np.full(size, np.nan), where=pairs > 0)
    return UserAUC(names, areas, positives + negatives)


def numbered_users(users: ArrayLike, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct users (U,), ascending, and the number of each row's user (N,).

    Args:
        users: (N,) user of each row.
        rows: Rows N that there are.

    Raises:
        GatesError: There is not one user per row.
    """
    names_of_rows = np.asarray(users)
    if names_of_rows.shape != (rows,):
        raise GatesError(
            f"users have shape {names_of_rows.shape}, expected one for each of {rows} rows"
        )
    names, index = np.unique(names_of_rows, return_inverse=True)
    return names, index.reshape(-1)


class Gains(NamedTuple):
    """A multi-task model compared with single-task ones.

    Attributes:
        mean: Mean over tasks of (AUC − ½) / (single-task AUC − ½) − 1; NaN without a task.
        worse: Tasks whose AUC is lower than alone: the seesaw count.
        tasks: Tasks compared.
        left_out: Tasks without an AUC, or whose single-task AUC is not above ½.
    """

    mean: float
    worse: int
    tasks: int
    left_out: int


def gains_over_single(
    model: Mapping[str, float], single: Mapping[str, float], *, margin: float = 0.0
) -> Gains:
    """Return the mean relative gain over single-task models, and the number of tasks that lost.

    Args:
        model: Task to AUC.
        single: Task to the AUC of a model of that task alone.
        margin: Losses up to this do not count as worse.

    Raises:
        GatesError: The tasks differ.
    """
    if model.keys() != single.keys():
        raise GatesError(
            f"tasks differ: {', '.join(model)} and, alone, {', '.join(single)}; expected the same"
        )
    pairs = [(model[task], single[task]) for task in model]
    compared = [(gated, alone) for gated, alone in pairs if np.isfinite(gated) and alone > 0.5]
    gains = [(gated - 0.5) / (alone - 0.5) - 1 for gated, alone in compared]
    worse = sum(gated < alone - margin for gated, alone in compared)
    mean = float(np.mean(gains)) if gains else float("nan")
    return Gains(mean, worse, len(compared), len(pairs) - len(compared))


EPS = 1e-7
"""Probabilities are clipped to [EPS, 1 − EPS], the resolution of float32 near 1."""


def log_loss(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Measured:
    """Return the mean of −log p(label), in nats.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    values, positive, given = binary_rows(probs, labels, weights)
    if not given.sum() > 0:
        return Measured(float("nan"), "no row")
    return Measured(float(losses(probabilities(values), positive) @ given / given.sum()))


def normalized_entropy(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> Measured:
    """Return the log-loss over that of the constant base rate: 1 is no better than the mean.

    He et al., *Practical lessons from predicting clicks on ads at Facebook*, 2014.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    _, positive, given = binary_rows(probs, labels, weights)
    mass = float(given[positive].sum()), float(given[~positive].sum())
    if reason := missing_class(*mass):
        return Measured(float("nan"), reason)
    rate = mass[0] / sum(mass)
    return Measured(log_loss(probs, labels, weights).value / float(entropy(rate)))


def losses(probs: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return −log p(label) of every row, in nats; see `EPS`.

    Args:
        probs: (...).
        positive: (...) boolean.
    """
    return -np.log(np.clip(np.where(positive, probs, 1 - probs), EPS, 1 - EPS))


def entropy(rate: ArrayLike) -> np.ndarray:
    """Return the entropy of a base rate, in nats; 0 at 0 and 1."""
    rates = np.asarray(rate, dtype=float)
    certain = (rates == 0) | (rates == 1)
    inner = np.where(certain, 0.5, rates)
    entropies = -inner * np.log(inner) - (1 - inner) * np.log1p(-inner)
    return np.where(certain, 0.0, entropies)


BINS = 20


class Reliability(NamedTuple):
    """Rows in bins of about equal weight, from the smallest to the largest probability.

    Attributes:
        predicted: (B,) mean probability of each bin.
        observed: (B,) fraction of positives.
        counts: (B,) rows, or their weight; bins without are left out.
    """

    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray


def reliability(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, bins: int = BINS
) -> Reliability:
    """Return mean probabilities and frequencies in bins of equal mass.

    Rows of one probability share a bin, so that the order of rows does not matter.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.
        bins: Number of bins; fewer where many probabilities are equal.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
        ValueError: There is no bin.
    """
    check_at_least(1, bins=bins)
    values, positive, given = binary_rows(probs, labels, weights)
    unique, index = np.unique(probabilities(values), return_inverse=True)
    mass = np.bincount(index, given, len(unique))
    total = mass.sum()
    if not total > 0:
        return Reliability(np.zeros(0), np.zeros(0), np.zeros(0))
    middle = (mass.cumsum() - mass / 2) / total
    place = np.minimum((middle * bins).astype(np.intp), bins - 1)[index]
    counts = np.bincount(place, given, bins)
    filled = counts > 0
    counts = counts[filled]
    predicted = np.bincount(place, given * values, bins)[filled] / counts
    observed = np.bincount(place, given * positive, bins)[filled] / counts
    return Reliability(predicted, observed, counts)


def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, bins: int = BINS
) -> Measured:
    """Return the mean gap between predicted and observed frequency, over bins of equal mass.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.
        bins: Number of bins.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    bins_of_rates = reliability(probs, labels, weights, bins=bins)
    if not len(bins_of_rates.counts):
        return Measured(float("nan"), "no row")
    gaps = np.abs(bins_of_rates.predicted - bins_of_rates.observed)
    return Measured(float(gaps @ bins_of_rates.counts / bins_of_rates.counts.sum()))


def predicted_over_observed(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> Measured:
    """Return PCOC = Σ p / Σ y: above 1 where probabilities are too high on average.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    values, positive, given = binary_rows(probs, labels, weights)
    observed = float(given[positive].sum())
    if observed == 0:
        return Measured(float("nan"), "no positive row" if given.sum() > 0 else "no row")
    return Measured(float(probabilities(values) @ given / observed))
