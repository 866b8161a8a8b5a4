"""Coastlines of the world, and the land mask of a grid.

The outlines are those of Natural Earth 1:110m (public domain), countries merged by dropping their
common borders and coordinates rounded to 0.01 degree. Lakes inside one country are land; the
Caspian Sea, which lies between countries, is not.
"""

from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from weather.grid import Grid

SEAM = 179.98  # an edge on this meridian, or along the south pole, closes a ring and is no coast
POLE = -89.9


@lru_cache(maxsize=1)
def land_rings() -> tuple[np.ndarray, ...]:
    """Return the closed outlines of the land.

    Returns:
        Float64 arrays (points, 2) of longitude from -180 to 180 and latitude, degrees; the last
        point of a ring repeats its first. The arrays are cached and read-only.
    """
    asset = files("weather.data") / "assets" / "coastline.npz"
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        points = arrays["hundredths"].astype(np.float64) / 100
        ends = np.cumsum(arrays["lengths"].astype(np.int64))
    points.flags.writeable = False
    return tuple(np.split(points, ends[:-1]))


def coastline() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the coasts as polylines for drawing: (longitude, latitude) pairs in degrees.

    No polyline crosses the 180th meridian or follows it.
    """
    polylines = []
    for ring in land_rings():
        on_seam = np.abs(ring[:, 0]) >= SEAM
        at_pole = ring[:, 1] <= POLE
        artificial = (on_seam[1:] & on_seam[:-1]) | (at_pole[1:] & at_pole[:-1])
        pieces = np.split(ring, np.flatnonzero(artificial) + 1)
        polylines += [(piece[:, 0], piece[:, 1]) for piece in pieces if len(piece) > 1]
    return polylines


def land_mask(grid: Grid) -> Tensor:
    """Return which cell centers lie on land, by the even-odd rule; the result is cached.

    Returns:
        Boolean (H, W).
    """
    return _land_mask(grid).clone()


@lru_cache(maxsize=16)
def _land_mask(grid: Grid) -> Tensor:
    edges = np.concatenate([np.hstack((ring[:-1], ring[1:])) for ring in land_rings()])
    lon1, lat1, lon2, lat2 = edges.T
    longitude = (grid.longitude.numpy() + 180) % 360 - 180
    mask = np.empty(grid.shape, dtype=bool)
    for row, latitude in enumerate(grid.latitude.numpy()):
        spans = (lat1 <= latitude) != (lat2 <= latitude)
        share = (latitude - lat1[spans]) / (lat2[spans] - lat1[spans])
        crossings = np.sort(lon1[spans] + share * (lon2[spans] - lon1[spans]))
        mask[row] = np.searchsorted(crossings, longitude, side="right") % 2 == 1
    return torch.from_numpy(mask)
