"""Which grid cell a position lies in."""

import torch
from torch import Tensor

from weather.grid import Grid


def cell_of(grid: Grid, latitude: Tensor, longitude: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of the cell that contains each position.

    Args:
        grid: Cells bounded by the midpoints between rows and between columns.
        latitude: Degrees, any shape.
        longitude: Degrees in any convention, same shape.

    Returns:
        Two int64 tensors of that shape.
    """
    bounds = grid.latitude_bounds()
    ascending = bool(bounds[-1] > bounds[0])
    inner = bounds[1:-1] if ascending else bounds[1:-1].flip(0)
    row = torch.searchsorted(inner.contiguous(), latitude.to(inner).contiguous())
    row = row if ascending else grid.shape[0] - 1 - row
    west = grid.longitude_bounds()[:-1]
    eastward = (longitude.to(west) - west[0]) % 360.0
    column = torch.searchsorted((west - west[0]).contiguous(), eastward, right=True) - 1
    return row, column
