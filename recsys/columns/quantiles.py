"""Quantiles of a column that passes by once, in little memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core_gates.errors import check_at_least

Floats = NDArray[np.float64]


class QuantileSketch:
    """A hierarchy of sorted samples (Manku, Rajagopalan and Lindsay, 1998), deterministic.

    Level h holds values that stand for 2^h each. A full level is sorted and every second value of
    it goes up, the odd and the even ones alternately. Below ``capacity`` values it is exact, for N
    values ranks are off by at most N · log2(2N / capacity) / capacity. Which values arrive together
    changes nothing, only their order does.

    Args:
        capacity: Values of a level, even.
    """

    def __init__(self, capacity: int = 2**16) -> None:
        check_at_least(2, capacity=capacity)
        self.capacity = capacity + capacity % 2
        self._levels: list[Floats] = [np.empty(0)]
        self._odd: list[bool] = [False]

    def add(self, values: Floats) -> None:
        """Add values (N,), none of them NaN."""
        while len(values):
            room = self.capacity - len(self._levels[0])
            self._levels[0] = np.concatenate([self._levels[0], values[:room]])
            values = values[room:]
            self._promote()

    def _promote(self) -> None:
        level = 0
        while len(self._levels[level]) >= self.capacity:
            if level + 1 == len(self._levels):
                self._levels.append(np.empty(0))
                self._odd.append(False)
            upward = np.sort(self._levels[level])[int(self._odd[level]) :: 2]
            self._odd[level] = not self._odd[level]
            self._levels[level] = np.empty(0)
            self._levels[level + 1] = np.concatenate([self._levels[level + 1], upward])
            level += 1

    def quantiles(self, fractions: ArrayLike) -> Floats:
        """Return the smallest value whose rank reaches each fraction (Q,); NaN without values."""
        values = np.concatenate(self._levels)
        if not len(values):
            return np.full(np.shape(fractions), np.nan)
        weights = np.concatenate([np.full(len(v), 2.0**h) for h, v in enumerate(self._levels)])
        order = np.argsort(values, kind="stable")
        ranks = np.cumsum(weights[order])
        at = np.searchsorted(ranks, np.asarray(fractions) * ranks[-1])
        return values[order[np.minimum(at, len(values) - 1)]]
