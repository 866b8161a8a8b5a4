"""The forecast without any assimilation."""

from torch import Tensor

from weather.observations.gridded import GriddedObservations


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
