"""What a cycle expects of an assimilation method, the simplest ones, and several in one cycle.

Methods that start from an earlier analysis share a memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weather.observations.gridded import GriddedObservations


class Assimilator(Protocol):
    """Combine backgrounds with observations; learned and classical methods look the same.

    B timelines are independent of each other and may have different networks. M is the number of
    ensemble members, 1 for a deterministic method.

    The result never shares memory with the background. The classical methods return the background
    of a timeline without observations exactly, except those that ignore backgrounds altogether; a
    learned method need not.

    Attributes:
        members: M, the ensemble size that ``analyse`` expects.
    """

    members: int

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis.

        Args:
            background: (B, M, C, H, W) in physical units.
            observations: Fields (B, C, H, W) in the same units.

        Returns:
            (B, M, C, H, W) with the type of the background.
        """
        ...


def check_shapes(
    background: Tensor, observations: GriddedObservations, size: int, members: int
) -> None:
    """Refuse a background or observations of the wrong shape.

    Args:
        background: Expected (B, M, C, H, W).
        observations: Expected fields (B, C, H, W).
        size: Expected C H W.
        members: Expected M.

    Raises:
        ValueError: A shape differs.
    """
    shape = tuple(background.shape)
    if len(shape) != 5 or shape[1] != members or math.prod(shape[2:]) != size:
        raise ValueError(
            f"expected a background (B, {members}, C, H, W) with C*H*W = {size}, found {shape}"
        )
    if tuple(observations.values.shape) != (shape[0], *shape[2:]):
        raise ValueError(
            f"expected observations {(shape[0], *shape[2:])} for the background {shape}, found "
            f"{tuple(observations.values.shape)}"
        )


class Climatology:
    """Take the climatological mean for the analysis, whatever was forecast or observed.

    Args:
        mean: (C, H, W) in physical units.
    """

    members = 1

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return the mean for every timeline (B, 1, C, H, W)."""
        return self.mean.to(background).expand_as(background).clone()


class Persistence:
    """Take the first background, from which the timelines started, for every analysis."""

    members = 1

    def __init__(self) -> None:
        self.initial: Tensor | None = None

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return the background (B, 1, C, H, W) of the first call."""
        if self.initial is None:
            self.initial = background.clone()
        return self.initial.to(background).clone()


class FreeRun:
    """Ignore all observations.

    Args:
        members: Ensemble size M.
    """

    def __init__(self, members: int = 1) -> None:
        self.members = members

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return a copy of the background (B, M, C, H, W)."""
        return background.clone()


class SideBySide:
    """Analyze equal parts of the timelines with one method each, so that they share the forecast.

    Args:
        methods: N methods with the same number of members; the first takes the first Nth of the
            timelines, and so on.

    Raises:
        ValueError: There is none, or their members differ.
    """

    def __init__(self, methods: Sequence[Assimilator]) -> None:
        members = {method.members for method in methods}
        if len(members) != 1:
            raise ValueError(
                f"expected methods of one ensemble size, found {sorted(members) or 'no method'}"
            )
        self.methods, self.members = list(methods), members.pop()

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B, M, C, H, W).

        Raises:
            ValueError: B is no multiple of the number of methods.
        """
        count = len(self.methods)
        if len(background) % count:
            raise ValueError(
                f"{len(background)} timelines cannot be split evenly among {count} methods"
            )
        parts = zip(
            self.methods,
            background.chunk(count),
            observations.values.chunk(count),
            observations.errors.chunk(count),
            strict=True,
        )
        return torch.cat([m.analyse(x, GriddedObservations(y, e)) for m, x, y, e in parts])


Model = Callable[[Tensor, float], Tensor]
"""States (N, C, H, W) and hours to the states at the end of that time."""

SAME = 1e-4
"""Largest difference of a background from the forecast of the last analysis, of the largest value
of a channel: beyond it, the background is another one. Rounding is a hundred times smaller."""


class Past(NamedTuple):
    """An analysis (B, M, C, H, W) and the observations (B, C, H, W) that it has used."""

    analysis: Tensor
    observations: GriddedObservations


class AnalysisHistory:
    """The last analyses of every timeline of a cycle, for as long as backgrounds follow from them.

    An `Assimilator` is given the background at the time of the observations, not what it comes
    from. A method that works in a window before that time keeps its last analyses here, and looks
    up for how many cycles each timeline has continued from them without a break: the first
    background of a run, and one that a caller has replaced, are not the forecast of the last
    analysis, which is thus not used.

    Args:
        forecast: The model that the cycle forecasts with.
        hours: Length of a cycle.
        length: Cycles that are kept.
    """

    def __init__(self, forecast: Model, hours: float, length: int) -> None:
        self.forecast, self.hours = forecast, hours
        self._past: deque[Past] = deque(maxlen=max(length, 1))
        self._ages = torch.zeros(0, dtype=torch.long)
        self.length = length

    def ages(self, background: Tensor) -> Tensor:
        """Return (B,) cycles of uninterrupted history of each background, at most the length.

        Args:
            background: (B, M, C, H, W), the forecast from the last analysis where it continues.
        """
        nothing = torch.zeros(len(background), dtype=torch.long)
        if not self.length or not self._past or self._past[-1].analysis.shape != background.shape:
            return nothing
        with torch.no_grad():
            last = self._past[-1].analysis
            expected = self.forecast(last.flatten(0, 1), self.hours).view_as(background)
        size = expected.abs().amax((1, 3, 4))
        apart = (background - expected).abs().amax((1, 3, 4))
        same = (apart <= SAME * size).all(1)  # NaN is never the same
        return torch.where(same, (self._ages + 1).clamp(max=self.length), nothing)

    def back(self, cycles: int) -> Past:
        """Return what was analysed some cycles before the current time, at least 1."""
        return self._past[-cycles]

    def remember(self, analysis: Tensor, observations: GriddedObservations, ages: Tensor) -> None:
        """Keep an analysis, with the ages of its background."""
        self._past.append(Past(analysis.detach().clone(), observations))
        self._ages = ages
