"""Percentile intervals from resampled patients, alone, in pairs of models, and over seeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Scores = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Weights (R, N) of N samples in R resamples -> name of a score -> (R,)."""

CHUNK = 4_000_000  # weights held at once


class Interval(NamedTuple):
    """A score with a percentile interval.

    Attributes:
        value: Score of the sample itself, the mean over seeds if there are several.
        low: Lower percentile of the resampled scores.
        high: Upper percentile.
        units: Number of independent units, the clusters.
    """

    value: float
    low: float
    high: float
    units: int


class Difference(NamedTuple):
    """A score of one model minus that of another on the same samples.

    Attributes:
        value: Difference on the sample itself.
        low: Lower percentile of the resampled differences.
        high: Upper percentile.
        p_value: Two-sided, twice the smaller share of resamples on either side of zero.
        units: Number of clusters.
    """

    value: float
    low: float
    high: float
    p_value: float
    units: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


class ClusterBootstrap:
    """Draw whole clusters with replacement, so that only clusters need to be independent.

    All scores that go through one instance see the same resamples, which makes differences
    paired. Where scores of several seeds are given, a resample also draws seeds, one fewer than
    there are: this keeps the variance over few seeds unbiased (McCarthy and Snowden, 1985).

    Args:
        clusters: (N,) identity of the cluster of each sample, such as the patient of an object.
        resamples: Number of draws.
        level: Coverage of intervals.
        seed: Of the draws.

    Raises:
        ValueError: There is no sample.
    """

    def __init__(
        self, clusters: ArrayLike, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> None:
        _, self._index = np.unique(np.asarray(clusters), return_inverse=True)
        if self._index.size == 0:
            raise ValueError("clusters is empty, expected one identity a sample")
        self.units = int(self._index.max()) + 1
        self.resamples = resamples
        self.level = level
        self.seed = seed
        draws = np.random.default_rng(seed)
        self._counts = np.empty((resamples, self.units), dtype=np.uint16)
        for row in self._counts:
            row[:] = np.bincount(draws.integers(self.units, size=self.units), minlength=self.units)

    def intervals(self, scores: Scores | Sequence[Scores]) -> dict[str, Interval]:
        """Return the interval of every score; with a single cluster its bounds are NaN.

        Args:
            scores: Of one model, or one for each of its seeds, on the same samples.
        """
        values, drawn = self._over_seeds(_as_list(scores))
        return {
            name: Interval(values[name], *self._percentiles(drawn[name]), self.units)
            for name in values
        }

    def differences(
        self, scores: Scores | Sequence[Scores], others: Scores | Sequence[Scores]
    ) -> dict[str, Difference]:
        """Return the differences of the scores that both models have.

        Args:
            scores: Of one model, or one for each seed.
            others: Of the model to compare with, on the same samples and for the same seeds.

        Raises:
            ValueError: The numbers of seeds differ.
        """
        scores, others = _as_list(scores), _as_list(others)
        if len(scores) != len(others):
            raise ValueError(f"{len(scores)} seeds cannot be paired with {len(others)}")
        values, drawn = self._over_seeds(scores)
        other_values, other_drawn = self._over_seeds(others)
        result = {}
        for name in values.keys() & other_values.keys():
            gaps = drawn[name] - other_drawn[name]
            gaps = gaps[np.isfinite(gaps)]
            sides = 1 + min((gaps <= 0).sum(), (gaps >= 0).sum())
            p_value = min(1.0, 2 * sides / (1 + len(gaps)))
            value = values[name] - other_values[name]
            low, high = self._percentiles(gaps)
            result[name] = Difference(value, low, high, p_value, self.units)
        return {name: result[name] for name in values if name in result}

    def _over_seeds(self, scores: list[Scores]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the mean over seeds of every score and of its resamples (R,)."""
        ones = np.ones((1, len(self._index)))
        plain = [{name: float(v[0]) for name, v in score(ones).items()} for score in scores]
        names = list(plain[0])
        values = {name: float(np.mean([one[name] for one in plain])) for name in names}
        chunks = [[score(weights) for score in scores] for weights in self._weights()]
        drawn = {
            name: np.concatenate([np.stack([one[name] for one in chunk]) for chunk in chunks], 1)
            for name in names
        }
        if len(scores) == 1:
            return values, {name: array[0] for name, array in drawn.items()}
        draws = np.random.default_rng((self.seed, 1))
        picked = draws.integers(len(scores), size=(len(scores) - 1, self.resamples))
        return values, {
            name: np.take_along_axis(array, picked, 0).mean(0) for name, array in drawn.items()
        }

    def _weights(self) -> Iterator[np.ndarray]:
        step = max(1, CHUNK // len(self._index))
        for start in range(0, self.resamples, step):
            yield self._counts[start : start + step, self._index].astype(float)

    def _percentiles(self, values: np.ndarray) -> tuple[float, float]:
        known = values[np.isfinite(values)]
        if self.units == 1 or known.size == 0:
            return float("nan"), float("nan")
        tail = (1 - self.level) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return float(low), float(high)


def _as_list(scores: Scores | Sequence[Scores]) -> list[Scores]:
    return [scores] if callable(scores) else list(scores)
