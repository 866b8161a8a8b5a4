"""Whether a store is on the grid that is expected."""

from __future__ import annotations

import math

from core_gates.errors import GatesError
from weather.grid import Grid

TOLERANCE = 1e-4  # degrees; coordinates in float32 differ by 2e-5


def require_grid(path: str, found: Grid, expected: Grid, whose: str = "the configuration") -> None:
    """Refuse a grid that is not the expected one.

    Args:
        path: The store.
        found: Its grid.
        expected: The grid that it should have.
        whose: What has that grid.

    Raises:
        GatesError: Coordinates differ.
    """
    difference = found.difference(expected)
    if difference <= TOLERANCE:
        return
    largest = f", whose coordinates differ by up to {difference:.3g} degrees"
    raise GatesError(
        f"{path} has {found.shape[0]} latitudes from {float(found.latitude[0]):g} and "
        f"{found.shape[1]} longitudes, expected {expected.shape[0]} from "
        f"{float(expected.latitude[0]):g} and {expected.shape[1]}"
        f"{largest if difference < math.inf else ''}: bring it to the grid of {whose} "
        "with `gates weather regrid`"
    )
