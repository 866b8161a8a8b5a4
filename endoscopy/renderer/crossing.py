"""Where a function along rays crosses zero from above."""

from copy import copy
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

PIECES = 8


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
        """Return where a straight line crosses zero; a little beyond if it does not quite."""
        share = self.above / (self.above - self.below).clamp(min=1e-9)
        return self.low + (self.high - self.low) * share

    def select(self, index: Tensor) -> Self:
        """Return these rays only."""
        return type(self)(*(part.index_select(0, index) for part in self))


def first_crossing(values: Tensor, samples: Tensor) -> tuple[Tensor, Bracket]:
    """Return which rays cross zero between two of their samples, and the first such interval.

    Args:
        values: (K, N) values, K < 256; those of the first samples count as positive.
        samples: (K, N) increasing distances.
    """
    num_samples = len(values)
    weights = torch.arange(num_samples, 0, -1, dtype=torch.uint8).unsqueeze(1)
    rank = (values < 0).view(torch.uint8).mul_(weights)[1:].amax(0)
    crossed = rank.nonzero().squeeze(1)
    values, samples = values.index_select(1, crossed), samples.index_select(1, crossed)
    first = num_samples - rank.index_select(0, crossed).long().unsqueeze(0)
    above = values.gather(0, first - 1)[0].clamp_(min=1e-6)
    low, high = samples.gather(0, first - 1)[0], samples.gather(0, first)[0]
    return crossed, Bracket(low, above, high, values.gather(0, first)[0])


def close_in(function: AlongRays, bracket: Bracket, tolerance: float) -> Tensor:
    """Return the distance (N,) of the crossing by secants, in pieces where one is not enough.

    Args:
        function: The function; it is left as it was.
        bracket: One interval a ray.
        tolerance: Intervals are cut to pieces where the value at their secant exceeds this.
    """
    middle = bracket.secant()
    value = function.value(middle)
    slope = (bracket.above - value).clamp(min=1e-6) / (middle - bracket.low).clamp(min=1e-6)
    result = middle + (value / slope).clamp(-0.5, 0.5)
    order = (value.abs() >= tolerance).nonzero().squeeze(1)
    function = copy(function)
    pieces = torch.linspace(0, 1, PIECES + 1).unsqueeze(1)
    if len(order):
        function.select(order)
        bracket = bracket.select(order)
        samples = bracket.low + (bracket.high - bracket.low) * pieces
        crossed, bracket = first_crossing(function.value(samples), samples)
        result[order[crossed]] = bracket.secant()
    return result
