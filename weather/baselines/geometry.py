"""Distances from every grid point to some of them, and functions of distance."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class GaspariCohnTaper:
    """`gaspari_cohn` as a function of the distance in km.

    Args:
        half_width_km: c; an infinite one gives ones everywhere.
    """

    half_width_km: float

    def __call__(self, distance_km: Tensor) -> Tensor:
        """Return the taper of distances of any shape."""
        return gaspari_cohn(distance_km / self.half_width_km)


class DistanceWeights:
    """A function of the distance from observed points to all points, kept for fixed networks.

    Args:
        grid: The grid.
        weight: Function of distances in km, element by element.
        capacity_mib: Memory for kept weights, least recently used first out.
    """

    def __init__(
        self, grid: Grid, weight: Callable[[Tensor], Tensor], *, capacity_mib: float = 256.0
    ) -> None:
        self._points = GridPoints(grid)
        self._weight = weight
        self._capacity = int(capacity_mib * 2**20)
        self._kept: OrderedDict[tuple[bytes, torch.dtype], Tensor] = OrderedDict()

    def at(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights (R, P) between the points ``rows`` (R,) and all points."""
        key = (rows.numpy().tobytes(), dtype)
        if key not in self._kept:
            self._kept[key] = self._weight(self._points.distances(rows)).to(dtype)
            while len(self._kept) > 1 and self._num_bytes() > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _num_bytes(self) -> int:
        return sum(weights.nbytes for weights in self._kept.values())
