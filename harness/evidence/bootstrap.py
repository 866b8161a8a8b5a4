"""Percentile intervals from resampled clusters or blocks, alone, in pairs, and over seeds."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from harness.evidence.rows import Difference, Interval


def draw_clusters(
    index: np.ndarray, units: int, generator: np.random.Generator, count: int
) -> np.ndarray:
    """Return how often each sample (N,) is drawn, (count, N), if whole clusters are drawn.

    Args:
        index: (N,) number of the cluster of each sample; where it has more dimensions, the result
            has them, too.
        units: Number of clusters; as many are drawn.
        generator: Of random numbers.
        count: Number of resamples.
    """
    drawn = generator.integers(units, size=(count, units)) + units * np.arange(count)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
    return cast(np.ndarray, counts.astype(float)[:, index])


def draw_crossed(
    indices: Sequence[np.ndarray],
    units: Sequence[int],
    generator: np.random.Generator,
    count: int,
) -> np.ndarray:
    """Return how often each sample is drawn, (count, N), if clusters of several kinds are drawn.

    Each kind of clusters is drawn for itself; a sample is drawn as often as the product of its
    clusters (the pigeonhole bootstrap of Owen, 2007). A resample without any is drawn again.

    Args:
        indices: For each kind, (N, M) numbers of the clusters of each sample.
        units: For each kind, number of its clusters.
        generator: Of random numbers.
        count: Number of resamples.
    """
    drawn = np.ones((count, len(indices[0])))
    for index, count_of in zip(indices, units, strict=True):
        drawn *= draw_clusters(index, count_of, generator, count).prod(-1)
    if (empty := ~drawn.any(1)).any():
        drawn[empty] = draw_crossed(indices, units, generator, int(empty.sum()))
    return drawn


def draw_blocks(length: int, block: int, generator: np.random.Generator, count: int) -> np.ndarray:
    """Return how often each of ``length`` samples is drawn, (count, length), in whole blocks.

    Args:
        length: Of the series, and of every resample: the last block drawn is cut.
        block: Length of a block.
        generator: Of random numbers.
        count: Number of resamples.
    """
    num_blocks = -(-length // block)
    starts = generator.integers(length - block + 1, size=(count, num_blocks))
    ends = starts + block
    ends[:, -1] -= block * num_blocks - length
    rows, columns = np.arange(count)[:, None] * (length + 1), count * (length + 1)
    steps = np.bincount((starts + rows).ravel(), minlength=columns) - np.bincount(
        (ends + rows).ravel(), minlength=columns
    )
    return steps.reshape(count, length + 1).cumsum(1)[:, :-1].astype(float)


def numbered(ids: Iterable[object]) -> tuple[np.ndarray, int]:
    """Return the number of the cluster of each sample (N,), and how many clusters there are.

    Args:
        ids: (N,) cluster of each sample, in any type; each missing one is its own cluster.

    Raises:
        ValueError: There is no sample, or not one id per sample.
    """
    labels = np.asarray(ids).tolist() if hasattr(ids, "__array__") else list(ids)
    if not isinstance(labels, list) or any(isinstance(label, list) for label in labels):
        raise ValueError(f"ids have shape {np.shape(labels)}, expected one a sample (N,)")
    if not labels:
        raise ValueError("ids are empty, expected one a sample")
    present = {label for label in labels if not _is_missing(label)}
    try:
        ordered = sorted(present)  # type: ignore[type-var]
    except TypeError:  # of several types
        ordered = sorted(present, key=lambda label: (type(label).__name__, str(label)))
    numbers = {label: number for number, label in enumerate(ordered)}
    index, units = np.empty(len(labels), dtype=np.intp), len(numbers)
    for position, label in enumerate(labels):
        if _is_missing(label):
            index[position], units = units, units + 1
        else:
            index[position] = numbers[label]
    return index, units


def _numbered_rows(ids: Iterable[object]) -> tuple[np.ndarray, int]:
    """Return the numbers of the clusters of each sample (N, M), and how many clusters there are."""
    if isinstance(ids, np.ndarray) and ids.ndim == 2:
        index, units = numbered(ids.ravel())
        return index.reshape(ids.shape), units
    index, units = numbered(ids)
    return index[:, None], units


def _is_missing(label: object) -> bool:
    if label is None or (isinstance(label, str) and not label):
        return True
    try:
        return bool(label != label)  # NaN and NaT differ from themselves
    except TypeError:  # pandas.NA is neither true nor false
        return True


Scores = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Weights (R, N) of N samples in R resamples -> name of a score -> (R,)."""


class SingleUnit:
    """Scores some of which rest on one of the units that are drawn, whatever the others hold.

    Every resample gives them the same value or none, so their intervals are unknown.

    Args:
        scores: The function.
        names: Those that rest on one unit.

    Attributes:
        single: As ``names``.
    """

    def __init__(self, scores: Scores, names: Collection[str]) -> None:
        self._scores, self.single = scores, frozenset(names)

    def __call__(self, weights: np.ndarray) -> Mapping[str, np.ndarray]:
        """Return the scores under weights (R, N)."""
        return self._scores(weights)


def single_of(scores: Scores) -> frozenset[str]:
    """Return which of some scores rest on one unit, as `SingleUnit` tells."""
    return scores.single if isinstance(scores, SingleUnit) else frozenset()


Transform = Callable[[np.ndarray], np.ndarray]
"""Weighted means (R, M) -> score (R,)."""


def moments(values: ArrayLike, transform: Transform | None = None, name: str = "value") -> Scores:
    """Return the score that a transform makes of the means of samples.

    Example::

        moments(squares, root, name="rmse")
        moments(np.stack((own, other), 1), root_ratio, name="rmse_ratio")

    Args:
        values: (N,) or (N, M), one row per sample; a NaN makes the score NaN.
        transform: Weighted means (R, M), M = 1 for values (N,), to the score (R,); the mean itself
            by default.
        name: Of the score.

    Raises:
        ValueError: The shape does not fit; later, weights or a transform of another shape.
    """
    samples = np.asarray(values, dtype=float)
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or not samples.size or (transform is None and samples.shape[1] != 1):
        raise ValueError(
            f"expected values (N,), or (N, M) with a transform, found {np.shape(values)}"
        )

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        if weights.shape[-1] != len(samples):
            raise ValueError(
                f"{weights.shape[-1]} samples are drawn, but {len(samples)} have values"
            )
        means = weights @ samples / weights.sum(-1, keepdims=True)
        score = means[..., 0] if transform is None else np.asarray(transform(means))
        if score.shape != weights.shape[:-1]:
            raise ValueError(f"the transform of means {means.shape} has shape {score.shape}")
        return {name: score}

    return scores


def root(means: np.ndarray) -> np.ndarray:
    """Return the root of a single mean square (..., 1): the transform of an RMSE."""
    return cast(np.ndarray, np.sqrt(means[..., 0]))


def root_ratio(means: np.ndarray) -> np.ndarray:
    """Return the ratio of the roots of two mean squares (..., 2): that of two RMSEs."""
    return cast(np.ndarray, np.sqrt(means[..., 0] / means[..., 1]))


CHUNK = 4_000_000  # weights held at once

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Generator, number of resamples R -> weights (R, N)."""


class Sampled(NamedTuple):
    """Scores of a method on a set of resamples, computed once for its interval and differences.

    Attributes:
        values: Every score, averaged over seeds.
        drawn: Every score under the resamples (R,).
        seeds: Number of seeds.
        single: Scores that rest on one unit, see `harness.evidence.SingleUnit`.
    """

    values: dict[str, float]
    drawn: dict[str, np.ndarray]
    seeds: int
    single: frozenset[str] = frozenset()


class Resamples:
    """One set of resamples: all scores computed on it are paired.

    Made by `clusters`, `crossed` or `blocks`. Every score sees the same
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
        something in common are independent after all (Owen, 2007). Where both clusters of a pair
        are of the same kind, such as two glyphs of one set, that is one kind: drawn as two, a
        cluster that is easy in both places would count as two different ones, and intervals would
        be too narrow.

        Args:
            ids: For each kind, (N,) cluster of each sample, see `clusters`, or an array
                (N, M) with all M of them.
            resamples: Number of resamples.
            level: Coverage of intervals.
            seed: Of the resampling.

        Raises:
            ValueError: There is no kind or no sample, or kinds differ in the number of samples.
        """
        numberings = [_numbered_rows(labels) for labels in ids]
        sizes = {len(index) for index, _ in numberings}
        if len(sizes) != 1:
            raise ValueError(
                f"kinds of clusters have {sorted(sizes)} samples, expected one id each a sample"
            )
        draw = partial(draw_crossed, [i for i, _ in numberings], [units for _, units in numberings])
        few = min(units for _, units in numberings)
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
        by_seed = _as_list(scores)
        single = frozenset[str]().union(*map(single_of, by_seed))
        return Sampled(*self._over_seeds(by_seed), len(by_seed), single)

    def intervals(self, scores: Scores | Sequence[Scores] | Sampled) -> dict[str, Interval]:
        """Return the interval of every score; bounds of one that rests on one unit are NaN.

        Args:
            scores: See `sampled`, or what it returned.

        Raises:
            ValueError: Seeds differ in their scores, or there is none.
        """
        sampled = self.sampled(scores)
        result = {}
        for name, value in sampled.values.items():
            units = 1 if name in sampled.single else self.units
            result[name] = Interval(value, *self._percentiles(sampled.drawn[name], units), units)
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
            scores: Of one method, or one for each seed; or what `sampled` returned.
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
        finite = scores[np.isfinite(scores)]
        if units == 1 or finite.size == 0:
            return float("nan"), float("nan")
        tail = (1 - self.level) / 2
        low, high = np.quantile(finite, [tail, 1 - tail])
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
        values = {name: float(np.mean([seed[name] for seed in plain])) for name in names}
        chunks = [[score(weights) for score in scores] for weights in self._weights()]
        drawn = {
            name: np.concatenate([np.stack([draw[name] for draw in chunk]) for chunk in chunks], 1)
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
    listed = [scores] if callable(scores) else list(scores)
    if not listed:
        raise ValueError("there are no scores, expected one a seed")
    return listed
