"""Analyses that never change: the climatological mean and the persisted initial state."""

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
    """Take the state from which the timelines started for every analysis.

    Args:
        initial: (B, C, H, W) in physical units.
    """

    members = 1

    def __init__(self, initial: Tensor) -> None:
        self.initial = initial

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return the initial states (B, 1, C, H, W)."""
        return self.initial.to(background).unsqueeze(1).expand_as(background).clone()
