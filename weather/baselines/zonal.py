"""Functions of distance on grids of equal longitude steps, which depend on the step alone.

Between two rows, a function of the great-circle distance is a circulant of the longitudes: one
table (H, H, W) holds what a matrix of all pairs of points would repeat W times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weather.grid import Grid, great_circle_km

TOLERANCE = 1e-6  # degrees
ROWS = 256  # points whose functions of distance are held at a time


def has_equal_steps(grid: Grid) -> bool:
    """Return whether the longitudes of a grid divide the circle into equal steps."""
    steps = grid.longitude_bounds().diff()
    return bool((steps - 360.0 / grid.shape[1]).abs().max() < TOLERANCE)


class ZonalFunction:
    """A function of the distance between the points of a grid.

    Args:
        grid: Of equal longitude steps.
        function: Of distances in km, element by element.
        dtype: Of the table.

    Attributes:
        table: (H, H, W) value between a row, another, and a number of steps to the east.

    Raises:
        ValueError: The steps of the longitudes differ.
    """

    def __init__(
        self, grid: Grid, function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        if not has_equal_steps(grid):
            raise ValueError(f"expected longitudes of equal steps around the globe, found {grid}")
        height, width = grid.shape
        east = torch.arange(width // 2 + 1, dtype=torch.float64) * (360.0 / width)
        rows, zero = grid.latitude, torch.zeros((), dtype=torch.float64)
        half = torch.stack(
            [function(great_circle_km(row, zero, rows[:, None], east)).to(dtype) for row in rows]
        )
        self.table = torch.cat((half, half[..., 1 : (width + 1) // 2].flip(-1)), -1)
        self.shape = (height, width)

    def transform(self) -> Tensor:
        """Return the Fourier transform (W // 2 + 1, H, H) in longitude, which is real."""
        return torch.fft.rfft(self.table.double(), dim=-1).real.permute(2, 0, 1).contiguous()

    def weighted(self, points: Tensor, *values: Tensor) -> list[Tensor]:
        """Return sums of the function around points, weighted.

        Args:
            points: (R,) indices of points, row by row.
            values: Each (..., R).

        Returns:
            Of each, (..., P).
        """
        height, width = self.shape
        twice = torch.cat((self.table, self.table), -1)
        found = [value.new_zeros(*value.shape[:-1], height * width) for value in values]
        for start in range(0, len(points), ROWS):
            part = slice(start, start + ROWS)
            near = torch.stack(
                [
                    twice[row, :, width - column : 2 * width - column]
                    for row, column in zip(
                        (points[part] // width).tolist(), (points[part] % width).tolist(),
                        strict=True,
                    )
                ]
            )  # fmt: skip
            for total, value in zip(found, values, strict=True):
                total += value[..., part] @ near.flatten(1).to(value)
        return found
