"""Percentile intervals from resampled clusters or blocks, alone, in pairs, and over seeds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from harness.evidence.draws import draw_blocks, draw_clusters, draw_crossed, numbered
from harness.evidence.interval import Difference, Interval
from harness.evidence.moments import Scores, single_of

CHUNK = 4_000_000  # weights held at once

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Generator, number of resamples R -> weights (R, N)."""


class Sampled(NamedTuple):
    """Scores of a method on a set of resamples, computed once for its interval and differences.

    Attributes:
        values: Every score, averaged over seeds.
        drawn: Every score under the resamples (R,).
        seeds: Number of seeds.
        single: Scores that rest on one unit, see :class:`harness.evidence.SingleUnit`.
    """

    values: dict[str, float]
    drawn: dict[str, np.ndarray]
    seeds: int
    single: frozenset[str] = frozenset()


class Resamples:
    """One set of resamples: all scores computed on it are paired.

    Made by :meth:`clusters`, :meth:`crossed` or :meth:`blocks`. Every score sees the same
    resamples, which makes differences paired. Where scores of S seeds are given, a resample also
    takes S - 1 of them, with replacement: this keeps the variance over few seeds unbiased (McCarthy
    and Snowden, 1985).

    Args:
        draw: Makes weights of samples.
        size: Number of samples N.
        units: Number of independent units among them.
        resamples: Number of resamples.
        level: Coverage of intervals.
        seed: Of the resampling.

    Raises:
        ValueError: There is no resample, or the level is not one.
    """

    def __init__(
        self, draw: Draw, size: int, units: int, *, resamples: int, level: float, seed: int
    ) -> None:
        if resamples < 1 or not 0 < level < 1:
            raise ValueError(
                f"found {resamples} resamples at level {level}, expected one or more, and 0 to 1"
            )
        self._draw, self.size, self.units = draw, size, units
        self.resamples, self.level, self.seed = resamples, level, seed

    @classmethod
    def clusters(
        cls, ids: Iterable[object], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> "Resamples":
        """Draw whole clusters with replacement, so that only clusters need to be independent.

        Args:
            ids: (N,) cluster of each sample. A sample whose cluster is missing (None, NaN, an empty
                text, ``pandas.NA``) is its own cluster.
            resamples: Number of resamples.
            level: Coverage of intervals.
            seed: Of the resampling.

        Raises:
            ValueError: There is no sample, or not one id per sample.
        """
        index, units = numbered(ids)
        draw = partial(draw_clusters, index, units)
        return cls(draw, len(index), units, resamples=resamples, level=level, seed=seed)

    @classmethod
    def crossed(
        cls,
        *ids: Iterable[object],
        resamples: int = 2000,
        level: float = 0.95,
        seed: int = 0,
    ) -> "Resamples":
        """Draw clusters of several kinds at once, where each sample is in one of each kind.

        Samples are pairs, such as of a subject and a style, and those that have either in common
        are not independent. Intervals are somewhat too wide, never too narrow, where samples with
        something in common are independent after all (Owen, 2007).

        Args:
            ids: For each kind, (N,) cluster of each sample, see :meth:`clusters`.
            resamples: Number of resamples.
            level: Coverage of intervals.
            seed: Of the resampling.

        Raises:
            ValueError: There is no kind or no sample, or kinds differ in the number of samples.
        """
        found = [numbered(one) for one in ids]
        sizes = {len(index) for index, _ in found}
        if len(sizes) != 1:
            raise ValueError(
                f"kinds of clusters have {sorted(sizes)} samples, expected one id each a sample"
            )
        draw = partial(draw_crossed, [i for i, _ in found], [units for _, units in found])
        few = min(units for _, units in found)
        return cls(draw, sizes.pop(), few, resamples=resamples, level=level, seed=seed)

    @classmethod
    def blocks(
        cls, length: int, block: int, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> "Resamples":
        """Draw blocks of successive samples of one time series (Künsch, 1989).

        Args:
            length: Samples of the series, in order of time.
            block: Length of a block, longer than the autocorrelation. The last block of a draw is
                cut, so that every resample has the length of the series.
            resamples: Number of resamples.
            level: Coverage of intervals.
            seed: Of the resampling.

        Raises:
            ValueError: The block does not fit twice into the series.
        """
        if not 1 <= block <= length // 2:
            raise ValueError(f"a block of {block} does not fit twice into {length} samples")
        draw = partial(draw_blocks, length, block)
        return cls(draw, length, length // block, resamples=resamples, level=level, seed=seed)

    def sampled(self, scores: Scores | Sequence[Scores] | Sampled) -> Sampled:
        """Return the scores of a method under all resamples.

        Args:
            scores: Of one method, or one for each of its seeds, on the same samples.

        Raises:
            ValueError: Seeds differ in their scores, or there is none.
        """
        if isinstance(scores, Sampled):
            return scores
        found = _as_list(scores)
        single = frozenset[str]().union(*map(single_of, found))
        return Sampled(*self._over_seeds(found), len(found), single)

    def intervals(self, scores: Scores | Sequence[Scores] | Sampled) -> dict[str, Interval]:
        """Return the interval of every score; bounds of one that rests on one unit are NaN.

        Args:
            scores: See :meth:`sampled`, or what it returned.

        Raises:
            ValueError: Seeds differ in their scores, or there is none.
        """
        found = self.sampled(scores)
        result = {}
        for name, value in found.values.items():
            units = 1 if name in found.single else self.units
            result[name] = Interval(value, *self._percentiles(found.drawn[name], units), units)
        return result

    def differences(
        self,
        scores: Scores | Sequence[Scores] | Sampled,
        others: Scores | Sequence[Scores] | Sampled,
    ) -> dict[str, Difference]:
        """Return the paired differences of the scores that both methods have.

        p is twice the smaller fraction of resamples on either side of 0, but at least
        2 / (resamples + 1), and at least 2^(1 - units), the smallest p of a sign test: a
        difference over few units cannot be significant, and with one unit p = 1.

        Args:
            scores: Of one method, or one for each seed; or what :meth:`sampled` returned.
            others: Of the method that is subtracted, on the same samples and for the same seeds. A
                single one, such as a method without seeds, is paired with every seed.

        Raises:
            ValueError: The numbers of seeds differ, or seeds differ in their scores.
        """
        ours, theirs = self.sampled(scores), self.sampled(others)
        if ours.seeds != theirs.seeds and 1 not in (ours.seeds, theirs.seeds):
            raise ValueError(f"{ours.seeds} seeds cannot be paired with {theirs.seeds}")
        result = {}
        for name in (name for name in ours.values if name in theirs.values):
            gaps = ours.drawn[name] - theirs.drawn[name]
            gaps = gaps[np.isfinite(gaps)]
            value = ours.values[name] - theirs.values[name]
            units = 1 if name in ours.single | theirs.single else self.units
            low, high = self._percentiles(gaps, units)
            result[name] = Difference(value, low, high, self._probability(gaps, units), units)
        return result

    def _probability(self, gaps: np.ndarray, units: int) -> float:
        sides = 1 + min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
        return min(1.0, max(2 * sides / (1 + len(gaps)), 2.0 ** (1 - units)))

    def _percentiles(self, scores: np.ndarray, units: int) -> tuple[float, float]:
        known = scores[np.isfinite(scores)]
        if units == 1 or known.size == 0:
            return float("nan"), float("nan")
        tail = (1 - self.level) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return float(low), float(high)

    def _over_seeds(self, scores: list[Scores]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the mean over seeds of every score and of its resamples (R,)."""
        ones = np.ones((1, self.size))
        plain = [{name: float(v[0]) for name, v in score(ones).items()} for score in scores]
        names = list(plain[0])
        for other in plain[1:]:
            if other.keys() != plain[0].keys():
                raise ValueError(
                    f"seeds differ in their scores: {', '.join(sorted(names ^ other.keys()))}"
                )
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
        """Yield weights (R, N) of all resamples, a few at a time; the same whatever the chunks."""
        generator = np.random.default_rng(self.seed)
        step = max(1, CHUNK // self.size)
        for start in range(0, self.resamples, step):
            yield self._draw(generator, min(step, self.resamples - start))


def _as_list(scores: Scores | Sequence[Scores]) -> list[Scores]:
    found = [scores] if callable(scores) else list(scores)
    if not found:
        raise ValueError("there are no scores, expected one a seed")
    return found
