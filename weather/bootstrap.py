"""Bootstrap intervals of scores whose samples depend on each other."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]
"""Mean moments (..., Q) to a score (...,), for example ``lambda m: m[..., 0].sqrt()``."""


class Interval(NamedTuple):
    """A score with a percentile interval.

    Attributes:
        value: Score of the whole sample.
        low: Lower percentile of the resampled scores.
        high: Upper percentile.
        units: Number of independent units, the clusters or blocks that were drawn.
    """

    value: float
    low: float
    high: float
    units: int


def clustered_bootstrap(
    values: Tensor,
    clusters: Tensor,
    *,
    transform: Transform | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Draw whole clusters with replacement, so that only clusters need to be independent.

    Args:
        values: (N,) or moments (N, Q), for example the square errors of two methods in pairs.
        clusters: (N,) identity of the cluster of each sample, for example a member or a seed.
        transform: Score of mean moments (..., Q); the mean itself by default, for (N,).
        level: Coverage of the interval.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        The interval; with a single cluster its bounds are NaN, since nothing can be said.

    Raises:
        ValueError: Shapes do not match, or there is no sample.
    """
    moments = _moments(values, transform)
    if clusters.shape != moments.shape[:1]:
        raise ValueError(f"expected clusters ({len(moments)},), found {tuple(clusters.shape)}")
    _, index = torch.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    sums = moments.new_zeros(count, moments.shape[1]).index_add_(0, index, moments)
    sizes = torch.bincount(index, minlength=count).double()
    score = transform or _first
    value = float(score(moments.mean(0)))
    if count == 1:
        return Interval(value, float("nan"), float("nan"), 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1, keepdim=True)
    return _interval(value, score(means), level, count)


def moving_block_bootstrap(
    values: Tensor,
    block: int,
    *,
    transform: Transform | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Draw blocks of successive values with replacement (Kunsch 1989), for one time series.

    Args:
        values: (T,) or moments (T, Q) in order of time.
        block: Length of a block, longer than the autocorrelation.
        transform: Score of mean moments (..., Q); the mean itself by default, for (T,).
        level: Coverage of the interval.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        The interval, whose units are the blocks that fit into the series.

    Raises:
        ValueError: The block does not fit twice into the series.
    """
    moments = _moments(values, transform)
    length = len(moments)
    if not 1 <= block <= length // 2:
        raise ValueError(f"a block of {block} does not fit twice into {length} values")
    num_blocks = -(-length // block)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(length - block + 1, (resamples, num_blocks), generator=generator)
    total = torch.cat((moments.new_zeros(1, moments.shape[1]), moments.cumsum(0)))
    # The last block is cut so that every resample has the length of the series.
    lengths = torch.full((num_blocks,), block)
    lengths[-1] = length - block * (num_blocks - 1)
    means = (total[starts + lengths] - total[starts]).sum(1) / length
    score = transform or _first
    return _interval(float(score(moments.mean(0))), score(means), level, length // block)


def root(moments: Tensor) -> Tensor:
    """Return the root of a single mean square (..., 1): the transform of an RMSE."""
    return moments[..., 0].sqrt()


def root_difference(moments: Tensor) -> Tensor:
    """Return the difference of the roots of two mean squares (..., 2): a paired RMSE difference."""
    return moments[..., 0].sqrt() - moments[..., 1].sqrt()


def root_ratio(moments: Tensor) -> Tensor:
    """Return the ratio of the roots of two mean squares (..., 2): a paired RMSE ratio."""
    return (moments[..., 0] / moments[..., 1]).sqrt()


def _first(moments: Tensor) -> Tensor:
    return moments[..., 0]


def _moments(values: Tensor, transform: Transform | None) -> Tensor:
    moments = values.double().unsqueeze(-1) if values.ndim == 1 else values.double()
    if moments.ndim != 2 or len(moments) == 0 or (transform is None and moments.shape[1] != 1):
        raise ValueError(
            f"expected values (N,), or (N, Q) with a transform, found {tuple(values.shape)}"
        )
    return moments


def _interval(value: float, scores: Tensor, level: float, count: int) -> Interval:
    tail = (1 - level) / 2
    low, high = torch.quantile(scores, scores.new_tensor([tail, 1 - tail])).tolist()
    return Interval(value, low, high, count)
