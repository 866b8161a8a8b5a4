"""What ships with the package: coastlines of the world and a small piece of ERA5."""

from functools import lru_cache
from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from harness.files import Data
from weather.data.axes import dataset_grid, to_tensor
from weather.grid import Grid
from weather.state import ERA5_SAMPLE, ChannelSpec

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


ATTRIBUTION = (
    "Contains modified Copernicus Climate Change Service information 2017 (ERA5 ensemble of data "
    "assimilations). Neither the European Commission nor ECMWF is responsible for any use that "
    "may be made of the Copernicus information or data it contains."
)


class Era5Sample(NamedTuple):
    """The sample as tensors.

    Attributes:
        fields: float32 (number 10, time 4, C 4, H 61, W 120), geopotential in m² s⁻² and
            temperature in K.
        grid: 61 latitudes from 90 to -90 and 120 longitudes from 0 to 357 degrees.
        channels: z850, z500, t850, t500, the level order of the file.
        times: (4,) datetime64, UTC.
    """

    fields: Tensor
    grid: Grid
    channels: ChannelSpec
    times: np.ndarray


def sample_data() -> list[Data]:
    """Describe the file of the sample by its content."""
    with as_file(files("weather.data") / "assets" / "era5_ensemble.nc") as path:
        return [Data.of("era5_ensemble", "truth", path)]


def load_era5_sample() -> Era5Sample:
    """Read the ERA5 ensemble sample; show `ATTRIBUTION` wherever its fields are published."""
    with (
        as_file(files("weather.data") / "assets" / "era5_ensemble.nc") as path,
        xr.open_dataset(path, engine="h5netcdf") as dataset,
    ):
        fields = to_tensor(dataset, ERA5_SAMPLE).transpose(0, 1).contiguous()
        return Era5Sample(fields, dataset_grid(dataset), ERA5_SAMPLE, dataset["time"].values)
