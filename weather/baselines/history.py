"""The memory of methods that start from an earlier analysis."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from weather.observations.gridded import GriddedObservations

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
