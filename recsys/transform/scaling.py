"""Numbers of a dense column, scaled by what the training rows were like."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.quantiles import QuantileSketch
from recsys.schema import Dense
from recsys.vocabulary import FIRST, MISSING

Floats = NDArray[np.float64]

LARGEST = 1e18  # of a scaled number: its square is still a finite float32
SMALLEST = 1e-300  # standard deviation whose inverse is finite


class Scaler(NamedTuple):
    """How numbers of a column are scaled: (f(x) − center) · factor.

    Attributes:
        center: Mean of f(x) over the training rows; 0 for raw numbers.
        factor: 1 / standard deviation of f(x); 1 for raw numbers and for constant columns.
        logarithmic: f(x) = sign(x) log(1 + |x|) instead of x.
    """

    center: float
    factor: float
    logarithmic: bool

    def scale(self, numbers: Floats, out: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Write scaled numbers (N,) to ``out``, 0 where missing, and return where that is."""
        missing = np.isnan(numbers)
        scaled = signed_log(numbers) if self.logarithmic else numbers.copy()
        with np.errstate(over="ignore"):
            scaled -= self.center
            scaled *= self.factor
        np.clip(scaled, -LARGEST, LARGEST, out=scaled)
        if missing.any():
            scaled[missing] = 0.0
        out[:] = scaled
        return missing


class Buckets(NamedTuple):
    """Which quantile a number lies in: the rows of a small embedding table.

    Attributes:
        edges: (Q - 1,) ascending; a value that equals an edge lies above it.
        buckets: Rows Q for quantiles, some of them unused where edges coincide.
    """

    edges: Floats
    buckets: int

    @property
    def num_rows(self) -> int:
        """Rows of the table, those for unknown, never used, and missing included."""
        return FIRST + self.buckets

    def rows(self, numbers: Floats) -> NDArray[np.int64]:
        """Return the row of each number (N,): 1 where missing, else 2 + its quantile."""
        found = FIRST + np.searchsorted(self.edges, numbers, side="right")
        found[np.isnan(numbers)] = MISSING
        return found


def signed_log(numbers: Floats) -> Floats:
    """Return sign(x) log(1 + |x|) of each number."""
    found = np.log1p(np.abs(numbers))
    return np.copysign(found, numbers, out=found)


@dataclass
class Moments:
    """Mean and variance of numbers that pass by once (Chan, Golub and LeVeque, 1983).

    Attributes:
        count: Numbers.
        mean: Of them.
        squares: Sum of squared distances from the mean.
        low: Smallest number.
        high: Largest number.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, numbers: Floats) -> None:
        """Add finite numbers (N,)."""
        if not len(numbers):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(numbers.mean())
            squares = float(np.square(numbers - mean).sum())
            count = self.count + len(numbers)
            apart = mean - self.mean
            self.squares += squares + apart * apart * (self.count * len(numbers) / count)
            self.mean += apart * len(numbers) / count
        self.count = count
        self.low = min(self.low, float(numbers.min()))
        self.high = max(self.high, float(numbers.max()))

    @property
    def deviation(self) -> float:
        """Standard deviation, exactly 0 where all numbers are equal."""
        return math.sqrt(self.squares / self.count) if self.high > self.low else 0.0


@dataclass
class DenseStatistics:
    """What is collected of one dense column while the training rows pass by.

    Attributes:
        feature: The column.
        moments: Of its numbers, or of their logarithms.
        sketch: Of its numbers, for buckets.
    """

    feature: Dense
    moments: Moments = field(default_factory=Moments)
    sketch: QuantileSketch = field(default_factory=QuantileSketch)

    def add(self, numbers: Floats) -> None:
        """Add numbers (N,), NaN where missing."""
        known = numbers[~np.isnan(numbers)]
        if self.feature.scaling == "buckets":
            self.sketch.add(known)
        elif self.feature.scaling != "none":
            self.moments.add(signed_log(known) if self._logarithmic else known)

    @property
    def _logarithmic(self) -> bool:
        return self.feature.scaling == "log_standardize"

    def finish(self) -> Scaler | Buckets:
        """Return how the column is scaled.

        Raises:
            GatesError: The variance exceeds the range of floating-point numbers.
        """
        if self.feature.scaling == "buckets":
            count = self.feature.buckets
            edges = self.sketch.quantiles(np.arange(1, count) / count)
            return Buckets(np.unique(edges[~np.isnan(edges)]), count)
        if self.feature.scaling == "none":
            return Scaler(0.0, 1.0, logarithmic=False)
        deviation, center = self.moments.deviation, self.moments.mean
        if not math.isfinite(deviation) or not math.isfinite(center):
            raise GatesError(
                f"column {self.feature.name!r} reaches from {self.moments.low:.3g} to "
                f"{self.moments.high:.3g}, too wide to be standardized: use scaling "
                "log_standardize"
            )
        if deviation < SMALLEST:
            return Scaler(self.moments.low if self.moments.count else 0.0, 1.0, self._logarithmic)
        return Scaler(center, 1.0 / deviation, self._logarithmic)
