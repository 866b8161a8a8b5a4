"""What a cycle expects of an assimilation method."""

import math
from typing import Protocol

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
