"""Metrics of a predicted quantity, such as play time: absolute error, and order of pairs."""

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from recsys.metrics.probabilities import GroupedAUC, Measured, UserAUC, grouped, numbered_users


def mean_absolute_error(
    predicted: ArrayLike, observed: ArrayLike, weights: ArrayLike | None = None
) -> Measured:
    """Return the mean absolute error, in the unit of the quantity.

    Args:
        predicted: (N,).
        observed: (N,).
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a value is NaN.
    """
    guess, truth = _quantities(predicted, observed)
    given = np.ones(len(guess)) if weights is None else np.asarray(weights, dtype=float)
    if given.shape != guess.shape:
        raise GatesError(f"weights have shape {given.shape}, expected {guess.shape}")
    if not given.sum() > 0:
        return Measured(float("nan"), "no row")
    return Measured(float(np.abs(guess - truth) @ given / given.sum()))


def xauc(predicted: ArrayLike, observed: ArrayLike) -> Measured:
    """Return the fraction of pairs of rows that the prediction orders as they were observed.

    Pairs of one observed value do not count, pairs of one predicted value count half: AUC for two
    observed values (Zhan et al., *Deconfounding duration bias in watch-time prediction*, 2022).
    Exact, O(N log N).

    Args:
        predicted: (N,).
        observed: (N,).

    Raises:
        GatesError: Lengths differ, or a value is NaN.
    """
    whole = user_xauc(predicted, observed, np.zeros(np.size(np.asarray(predicted)), dtype=int))
    if not len(whole.auc) or np.isnan(whole.auc[0]):
        return Measured(float("nan"), "no two rows differ" if len(whole.auc) else "no row")
    return Measured(float(whole.auc[0]))


def gxauc(predicted: ArrayLike, observed: ArrayLike, users: ArrayLike) -> GroupedAUC:
    """Return the XAUC within users, weighted by their rows and as a plain mean.

    Args:
        predicted: (N,).
        observed: (N,).
        users: (N,) user of each row.

    Returns:
        Means over the users with two different observed values.

    Raises:
        GatesError: Lengths differ, or a value is NaN.
    """
    by_user = grouped(user_xauc(predicted, observed, users))
    return by_user._replace(reason=by_user.reason and "no user has two rows that differ")


def user_xauc(predicted: ArrayLike, observed: ArrayLike, users: ArrayLike) -> UserAUC:
    """Return the XAUC of every user, NaN where no two rows differ, and the rows of each."""
    guess, truth = _quantities(predicted, observed)
    names, index = numbered_users(users, len(guess))
    size = len(names)
    order = np.lexsort((guess, truth, index))
    guess, truth, owner = guess[order], truth[order], index[order]
    by_guess = np.lexsort((truth, guess, owner))
    rank = np.empty(len(guess), dtype=np.intp)
    rank[by_guess] = _ties(owner[by_guess], guess[by_guess])
    rows = np.bincount(owner, minlength=size).astype(float)
    distinct = _pairs(rows) - _tied_pairs(_ties(owner, truth), owner, size)
    both = _ties(owner, truth, guess)
    halves = _tied_pairs(rank, owner, size) - _tied_pairs(both, owner, size)
    wrong = np.bincount(owner, larger_before(rank), size)
    wins = distinct - wrong - halves / 2
    areas = np.divide(wins, distinct, out=np.full(size, np.nan), where=distinct > 0)
    return UserAUC(names, areas, rows)


def larger_before(numbers: np.ndarray) -> np.ndarray:
    """Return for every number (N,), from 0 on, how many before it are larger.

    Numbers are split by one bit after the other, as in a wavelet tree: numbers that agree in all
    higher bits lie together, in their old order; among them every 1 precedes the zeros after it
    wrongly. O(N log N) without a loop over rows.
    """
    total = np.zeros(len(numbers))
    if not len(numbers):
        return total
    place = np.arange(len(numbers))  # row at each position
    numbers = numbers.copy()
    for bit in range(int(numbers.max()).bit_length() - 1, -1, -1):
        group = numbers >> (bit + 1)
        ones = (numbers >> bit) & 1
        first = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(first, append=len(numbers))
        before = ones.cumsum() - ones
        before -= np.repeat(before[first], sizes)  # ones of the group before each position
        total[place[ones == 0]] += before[ones == 0]
        start = np.repeat(first, sizes)
        zeros = np.repeat(np.add.reduceat(1 - ones, first), sizes)
        within = np.arange(len(numbers)) - start
        target = start + np.where(ones == 1, zeros + before, within - before)
        place[target], numbers[target] = place.copy(), numbers.copy()
    return total


def _quantities(predicted: ArrayLike, observed: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    guess, truth = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
    if guess.ndim != 1 or guess.shape != truth.shape:
        raise GatesError(f"predicted {guess.shape} and observed {truth.shape} must be (N,) both")
    if np.isnan(guess).any() or np.isnan(truth).any():
        raise GatesError("predicted and observed must not be NaN; leave out such rows")
    return guess, truth


def _ties(*columns: np.ndarray) -> np.ndarray:
    """Return the number (N,) of the run of equal rows that each row of sorted columns is in."""
    changes = np.zeros(len(columns[0]), dtype=bool)
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return changes.cumsum()


def _tied_pairs(runs: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """Return the number of pairs in one run, of every owner (U,)."""
    if not len(runs):
        return np.zeros(size)
    counts = np.bincount(runs).astype(float)
    owners = np.empty(len(counts), dtype=np.intp)
    owners[runs] = owner
    return np.bincount(owners, _pairs(counts), size)


def _pairs(counts: np.ndarray) -> np.ndarray:
    return counts * (counts - 1) / 2
