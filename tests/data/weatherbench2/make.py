"""Fake reanalysis in the layout of the WeatherBench-2 stores, tiny and smooth."""

from pathlib import Path

import numpy as np
import xarray as xr

from weather.state import ChannelSpec

CHANNELS = ChannelSpec(
    surface=("2m_temperature", "mean_sea_level_pressure"),
    upper=("geopotential", "temperature"),
    levels=(850, 500),
)
"""Some of the fields, in another order of levels."""

LEVELS = (500, 700, 850)
MEAN = {"geopotential": (54_000.0, 29_000.0, 14_000.0), "temperature": (255.0, 272.0, 283.0)}
AMPLITUDE = {"geopotential": 900.0, "temperature": 9.0}
SURFACE = {
    "2m_temperature": (288.0, 12.0),
    "mean_sea_level_pressure": (101_300.0, 800.0),
    "10m_u_component_of_wind": (1.0, 8.0),
}


def official(times: int = 4, rows: int = 8, columns: int = 16, *, order: str = "lat") -> xr.Dataset:
    """Return 6-hourly fields with descending latitudes and float32 values.

    Args:
        times: Number of times from 2017-01-01.
        rows: Latitudes, off the poles.
        columns: Longitudes from 0.
        order: ``lat`` for (level, latitude, longitude), ``lon`` for (level, longitude, latitude).
    """
    step = 180 / rows
    latitude = 90 - step / 2 - step * np.arange(rows)
    longitude = 360 / columns * np.arange(columns)
    time = np.datetime64("2017-01-01", "ns") + np.arange(times) * np.timedelta64(6, "h")
    phase = np.arange(times)[:, None, None] + np.deg2rad(3 * longitude)
    wave = np.sin(phase) * np.cos(np.deg2rad(latitude))[:, None] + np.deg2rad(latitude)[:, None] / 5
    data = {
        name: (("time", "latitude", "longitude"), (mean + size * wave).astype(np.float32))
        for name, (mean, size) in SURFACE.items()
    }
    for name, means in MEAN.items():
        stacked = np.stack([mean + AMPLITUDE[name] * wave for mean in means], 1).astype(np.float32)
        data[name] = (("time", "level", "latitude", "longitude"), stacked)
    coordinates = {
        "time": time,
        "level": list(LEVELS),
        "latitude": latitude,
        "longitude": longitude,
    }
    dataset = xr.Dataset(data, coordinates)
    if order == "lon":
        dataset = dataset.transpose("time", "level", "longitude", "latitude")
    return dataset


def zarr(
    dataset: xr.Dataset,
    folder: Path,
    *,
    version: int = 2,
    consolidated: bool = True,
    encoding: dict | None = None,
    name: str = "store.zarr",
) -> Path:
    """Write a dataset into a new Zarr store of a folder."""
    path = folder / name
    dataset.to_zarr(path, zarr_format=version, consolidated=consolidated, encoding=encoding)
    return path


def netcdf(
    dataset: xr.Dataset,
    folder: Path,
    *,
    encoding: dict | None = None,
    engine: str = "h5netcdf",
    name: str = "store.nc",
) -> Path:
    """Write a dataset into a NetCDF file of a folder."""
    path = folder / name
    dataset.to_netcdf(path, engine=engine, encoding=encoding)
    return path
