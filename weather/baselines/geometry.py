"""Distances from every grid point to some of them, and functions of distance."""

import torch
from torch import Tensor

from weather.grid import Grid, great_circle_km


class GridPoints:
    """The P = H W points of a grid as a list, row by row.

    Args:
        grid: The grid.
    """

    def __init__(self, grid: Grid) -> None:
        height, width = grid.shape
        self.count = height * width
        self.latitude = grid.latitude.repeat_interleave(width)
        self.longitude = grid.longitude.repeat(height)

    def distances(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return great-circle distances, km, float64.

        Args:
            rows: Indices (R,) of points.
            columns: Indices (K,) of points, all P points if None.

        Returns:
            (R, K), or (R, P).
        """
        keep = slice(None) if columns is None else columns
        return great_circle_km(
            self.latitude[rows, None],
            self.longitude[rows, None],
            self.latitude[keep],
            self.longitude[keep],
        )


def gaspari_cohn(ratio: Tensor) -> Tensor:
    """Return the compactly supported correlation of Gaspari and Cohn (1999), equation 4.10.

    Args:
        ratio: Distance over the half width c; the function vanishes from 2 on.
    """
    r = ratio.abs().clamp(max=2.0)
    inner = (((-r / 4 + 0.5) * r + 5 / 8) * r - 5 / 3) * r**2 + 1
    safe = r.clamp(min=1.0)
    outer = ((((r / 12 - 0.5) * r + 5 / 8) * r + 5 / 3) * r - 5) * r + 4 - 2 / (3 * safe)
    return torch.where(r < 1, inner, outer).clamp(min=0.0)
