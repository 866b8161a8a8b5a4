"""How good the first k of every list are: NDCG and recall."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_at_least
from recsys.metrics.grouped_auc import numbered_users


class ListScore(NamedTuple):
    """A mean over lists.

    Attributes:
        value: The mean; NaN where no list has anything to find.
        lists: Lists with something to find.
        excluded: Lists without.
    """

    value: float
    lists: int
    excluded: int


def ndcg_at(k: int, scores: ArrayLike, gains: ArrayLike, lists: ArrayLike) -> ListScore:
    """Return the mean normalized discounted cumulative gain of the first k of every list.

    DCG = Σ gain / log2(1 + rank), over that of the best order (Järvelin and Kekäläinen, 2002). Rows
    that tie are taken in the mean over their orders, so that the order of rows does not matter.

    Args:
        k: Places that count.
        scores: (N,).
        gains: (N,), not negative; binary labels, for example.
        lists: (N,) list of each row, such as a user and a day.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a gain is negative.
        ValueError: k is below 1.
    """
    ranked = _Ranked(k, scores, gains, lists)
    discount = np.where(ranked.rank <= k, 1 / np.log2(1 + ranked.rank), 0.0)
    found = np.bincount(ranked.owner, ranked.expected() * discount, ranked.size)
    best = np.bincount(ranked.owner, ranked.sorted_gains() * discount, ranked.size)
    return _mean(found, best)


def recall_at(k: int, scores: ArrayLike, labels: ArrayLike, lists: ArrayLike) -> ListScore:
    """Return the mean fraction of the positive rows of a list that are among its first k.

    Args:
        k: Places that count.
        scores: (N,); ties are taken in the mean over their orders.
        labels: (N,), 0 or 1.
        lists: (N,) list of each row.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a label is negative.
        ValueError: k is below 1.
    """
    ranked = _Ranked(k, scores, labels, lists)
    within = np.where(ranked.rank <= k, ranked.expected(), 0.0)
    found = np.bincount(ranked.owner, within, ranked.size)
    return _mean(found, np.bincount(ranked.owner, ranked.gains, ranked.size))


class _Ranked:
    """Rows sorted by list, then from the highest to the lowest score.

    Attributes:
        owner: (N,) number of the list.
        rank: (N,) place in its list, from 1.
        gains: (N,).
        size: Number of lists.
    """

    def __init__(self, k: int, scores: ArrayLike, gains: ArrayLike, lists: ArrayLike) -> None:
        check_at_least(1, k=k)
        values, given = np.asarray(scores, dtype=float), np.asarray(gains, dtype=float)
        if values.ndim != 1 or values.shape != given.shape:
            raise GatesError(f"scores {values.shape} and gains {given.shape} must be (N,) both")
        if np.isnan(values).any() or not (given >= 0).all():
            raise GatesError("scores must not be NaN, and gains neither NaN nor negative")
        names, index = numbered_users(lists, len(values))
        order = np.argsort(-values)
        order = order[np.argsort(index[order], kind="stable")]
        self.size = len(names)
        self.owner, self.gains, self._scores = index[order], given[order], values[order]
        starts = np.searchsorted(self.owner, np.arange(self.size))
        self.rank = np.arange(len(order)) - starts[self.owner] + 1

    def expected(self) -> np.ndarray:
        """Return the gain at every place (N,), the mean over those that tie there."""
        first = np.ones(len(self.rank), dtype=bool)
        first[1:] = (self._scores[1:] != self._scores[:-1]) | (self.owner[1:] != self.owner[:-1])
        tie = first.cumsum() - 1
        means = np.bincount(tie, self.gains) / np.maximum(np.bincount(tie), 1)
        return means[tie]

    def sorted_gains(self) -> np.ndarray:
        """Return the gains in the best order of every list (N,)."""
        return self.gains[np.lexsort((-self.gains, self.owner))]


def _mean(found: np.ndarray, best: np.ndarray) -> ListScore:
    known = best > 0
    count = int(known.sum())
    value = float((found[known] / best[known]).mean()) if count else float("nan")
    return ListScore(value, count, len(best) - count)
