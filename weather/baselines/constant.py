"""Analyses that never change: the climatological mean and the first background."""

from torch import Tensor

from weather.observations.gridded import GriddedObservations


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
