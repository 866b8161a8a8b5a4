"""Where a function along rays crosses zero from above."""

from copy import copy
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

PIECES = 8
BLOCK = 2**15
"""Values that are computed together; larger arrays take longer to allocate than to fill."""


class AlongRays(Protocol):
    """A function of the distance along each of N rays."""

    def select(self, index: Tensor) -> None:
        """Keep these rays only."""

    def value(self, distance: Tensor) -> Tensor:
        """Return the values (..., N) at these distances (..., N)."""


class Bracket(NamedTuple):
    """An interval of each ray in which the function falls from positive to at most a little.

    Attributes:
        low: (N,) distance in mm.
        above: (N,) positive value there.
        high: (N,) larger distance.
        below: (N,) value there, negative or a little above zero.
    """

    low: Tensor
    above: Tensor
    high: Tensor
    below: Tensor

    def secant(self) -> Tensor:
        """Return where a straight line crosses zero; slightly beyond it if it does not quite."""
        share = self.above / (self.above - self.below).clamp(min=1e-9)
        return self.low + (self.high - self.low) * share

    def select(self, index: Tensor) -> Self:
        """Return these rays only."""
        return type(self)(*(part.index_select(0, index) for part in self))


def first_crossing(
    function: AlongRays, origin: Tensor, extent: Tensor, shares: Tensor
) -> tuple[Tensor, Bracket]:
    """Return which rays cross zero between two samples, and the first such interval.

    Args:
        function: The function; its values at the first samples count as positive.
        origin: (N,) distances from which the samples are counted.
        extent: (N,) lengths in which they are counted.
        shares: (K,) increasing, K < 256: the samples lie at ``origin + shares * extent``.
    """
    num_samples, num_rays = len(shares), len(origin)
    rows = max(1, BLOCK // max(num_rays, 1))
    values = torch.cat(
        [
            function.value(torch.addcmul(origin, extent, part.unsqueeze(1)))
            for part in shares.split(rows)
        ]
    )
    weights = torch.arange(num_samples, 0, -1, dtype=torch.uint8).unsqueeze(1)
    rank = (values < 0).view(torch.uint8).mul_(weights)[1:].amax(0)
    crossed = rank.nonzero().squeeze(1)
    below = num_samples - rank.index_select(0, crossed).long()  # the first sample below zero
    place = crossed + below * num_rays
    origin, extent = origin.index_select(0, crossed), extent.index_select(0, crossed)
    return crossed, Bracket(
        torch.addcmul(origin, extent, shares.index_select(0, below - 1)),
        values.view(-1).index_select(0, place - num_rays).clamp_(min=1e-6),
        torch.addcmul(origin, extent, shares.index_select(0, below)),
        values.view(-1).index_select(0, place),
    )


def close_in(function: AlongRays, bracket: Bracket, tolerance: float) -> Tensor:
    """Return the distance (N,) of the crossing by secants, in pieces where one is not enough.

    Args:
        function: The function; it is left as it was.
        bracket: One interval a ray.
        tolerance: Intervals are cut to pieces where the value at their secant exceeds this.
    """
    middle = bracket.secant()
    value = function.value(middle)
    slope = (bracket.above - value).clamp_(min=1e-6).div_((middle - bracket.low).clamp_(min=1e-6))
    result = middle + (value / slope).clamp_(-0.5, 0.5)
    order = (value.abs() >= tolerance).nonzero().squeeze(1)
    if len(order):
        function = copy(function)
        function.select(order)
        low, _, high, _ = bracket.select(order)
        shares = torch.linspace(0, 1, PIECES + 1)
        crossed, inner = first_crossing(function, low, high - low, shares)
        result.index_copy_(0, order.index_select(0, crossed), inner.secant())
    return result
