"""Opening gridded data in the schema of WeatherBench 2 (Rasp et al. 2024), whatever its dialect."""

import os
from typing import Any

import xarray as xr

from core_gates.errors import GatesError
from weather.data.axes import DIMENSIONS, canonical_axes, level_positions, rename_axes, require_step
from weather.data.quality import check_values
from weather.data.store import open_store
from weather.state import SHORT_NAMES, ChannelSpec


def open_wb2(
    source: str | os.PathLike[str] | xr.Dataset,
    channels: ChannelSpec | None = None,
    *,
    hours: float | None = None,
    allow_missing: bool = False,
    drop_duplicate_times: bool = False,
    check: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> xr.Dataset:
    """Open a store lazily in canonical form, or raise an error that names its fault and the fix.

    Accepted silently: Zarr 2 and 3 with or without consolidated metadata, NetCDF 3 and 4
    including packed and masked integers, any order of dimensions, latitudes and times in either
    order, longitudes from -180 or from 0, ``lat``/``lon``, ECMWF short names and other aliases,
    ensembles, forecasts, uneven time steps, a scalar time.

    Args:
        source: Path, fsspec URL or an open dataset.
        channels: What to keep, levels in the order of the channels; everything on the grid,
            levels ascending, if not given.
        hours: Required time step; any if not given.
        allow_missing: Accept missing values; their fraction of a sample is in the attribute
            ``missing_fraction`` of every variable.
        drop_duplicate_times: Keep the first of the fields that share a time.
        check: Judge the values of a few time steps (see `weather.data.quality.check_values`);
            False reads coordinates only.
        storage_options: Passed to the file system of a URL.

    Returns:
        Variables (time[, prediction_timedelta][, number][, level], latitude, longitude) under
        WeatherBench-2 names, nothing but coordinates in memory; latitudes descend, longitudes run
        from 0 to 360, levels are int64, times and leads in nanoseconds. Close it after use.

    Raises:
        GatesError: One line with the store, what was found and expected, and the fix.
    """
    raw = source if isinstance(source, xr.Dataset) else open_store(source, storage_options)
    try:
        dataset = _named(rename_axes(raw))
        dataset = dataset[_choose(dataset, channels)]
        dataset = canonical_axes(dataset, drop_duplicate_times=drop_duplicate_times)
        dataset = _ordered(dataset, channels)
        if hours is not None:
            require_step(dataset, hours)
        if check:
            dataset = check_values(dataset, allow_missing=allow_missing)
    except GatesError as error:
        if raw is source:
            raise
        raw.close()
        raise GatesError(f"{os.fspath(source)}: {error}") from error
    dataset.set_close(raw.close)
    return dataset


def _named(dataset: xr.Dataset) -> xr.Dataset:
    """Give variables that have an ECMWF short name their WeatherBench-2 name."""
    names = {
        short: name
        for name, short in SHORT_NAMES.items()
        if name not in dataset and short in dataset.data_vars
    }
    return dataset.rename(names)


def _choose(dataset: xr.Dataset, channels: ChannelSpec | None) -> list[str]:
    """Return the variables to keep: those of the channels, or all on the horizontal grid."""
    if channels is None:
        horizontal = {"latitude", "longitude"}
        if not horizontal <= set(dataset.dims):
            return [str(name) for name in dataset.data_vars]
        found = [str(name) for name, array in dataset.items() if horizontal <= set(array.dims)]
        if not found:
            raise GatesError("holds no variable on the grid; name a store with fields")
        return found
    wanted = [*channels.surface, *channels.upper]
    missing = [name for name in wanted if name not in dataset.data_vars]
    if missing:
        available = ", ".join(sorted(map(str, dataset.data_vars))) or "none"
        raise GatesError(
            f"variable {', '.join(missing)} is missing, found {available}; choose channels that "
            "exist or add the variable"
        )
    if channels.upper and "level" not in dataset.dims:
        raise GatesError(
            f"has no dimension level for {', '.join(channels.upper)}, found "
            f"{', '.join(map(str, dataset.dims))}; name a store on pressure levels or choose "
            "surface variables"
        )
    return wanted


def _ordered(dataset: xr.Dataset, channels: ChannelSpec | None) -> xr.Dataset:
    """Check the dimensions of every variable and bring them and the levels into order."""
    for name, array in dataset.items():
        expected = {"time", "latitude", "longitude"}
        if channels is not None and name in channels.upper:
            expected.add("level")
        absent = [dim for dim in DIMENSIONS if dim in expected - set(array.dims)]
        if absent:
            raise GatesError(
                f"{name} lacks the dimension {', '.join(absent)}, found "
                f"{', '.join(map(str, array.dims))}; write it with all dimensions"
            )
        extra = [str(dim) for dim in array.dims if dim not in DIMENSIONS]
        if channels is not None and name in channels.surface and "level" in array.dims:
            extra.append("level")
        if extra:
            raise GatesError(
                f"{name} has the dimension {', '.join(extra)}, expected "
                f"{', '.join(DIMENSIONS)}; select one entry of it"
            )
    if channels is not None and channels.levels:
        dataset = dataset.isel(level=level_positions(dataset, channels.levels))
    return dataset.transpose(*[name for name in DIMENSIONS if name in dataset.dims])
