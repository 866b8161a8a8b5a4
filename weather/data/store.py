"""Opening a Zarr, NetCDF or GRIB store at a path or URL, in any dialect of WeatherBench 2."""

from __future__ import annotations

import difflib
import gc
import json
import math
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

import fsspec
import xarray as xr
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from core_gates.errors import GatesError
from weather.data.axes import (
    DIMENSIONS,
    canonical_axes,
    check_values,
    level_positions,
    rename_axes,
    require_step,
)
from weather.grid import Grid
from weather.state import SHORT_NAMES, ChannelSpec
from weather.variables import VARIABLES

ZARR_MARKERS = (".zmetadata", "zarr.json", ".zgroup")
ENGINES = {
    b"\x89HDF": "h5netcdf",
    b"CDF\x01": "scipy",
    b"CDF\x02": "scipy",
    b"GRIB": "cfgrib",
}
FOREIGN = {
    b"CDF\x05": "NetCDF in the CDF-5 format: convert it with 'nccopy -k nc4'",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x1f\x8b": "compressed with gzip: unpack it with gunzip",
    b"BUFR": "a BUFR file of observations, expected gridded fields: convert it",
}


CFGRIB_OPTIONS = {"indexpath": "", "errors": "raise"}  # no index file, no message left out


def open_store(
    source: str | os.PathLike[str], storage_options: dict[str, Any] | None = None
) -> xr.Dataset:
    """Open a store lazily, as it is; only coordinates are read.

    Args:
        source: Path or fsspec URL of a Zarr group (format 2 or 3, consolidated or not), a NetCDF
            file (3 or 4) or, where cfgrib is installed, a GRIB file.
        storage_options: Passed to the file system of a URL, such as ``{"token": "anon"}``.

    Raises:
        GatesError: If there is no store, or it is damaged, or a package is missing to read it.
    """
    url = os.fspath(source)
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
    except (ImportError, ValueError) as error:
        raise GatesError(f"{url}: cannot be reached: {_first_line(error)}") from error
    try:
        if any(filesystem.exists(f"{path}/{marker}") for marker in (*ZARR_MARKERS, ".zarray")):
            return _open_zarr(filesystem, path, url, storage_options)
        _require(filesystem, path, url)
        return _open_file(filesystem, path, url)
    except PermissionError as error:
        raise GatesError(f"{url}: permission denied; give yourself read access") from error


@contextmanager
def naming(source: str | os.PathLike[str]) -> Iterator[None]:
    """Put the name of a store before the message of a `GatesError` that does not know it."""
    try:
        yield
    except GatesError as error:
        raise GatesError(f"{os.fspath(source)}: {error}") from error


def _require(filesystem: AbstractFileSystem, path: str, url: str) -> None:
    """Raise unless a file lies at the path."""
    if not filesystem.exists(path):
        parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
        siblings = filesystem.ls(parent, detail=False) if filesystem.isdir(parent) else []
        close = difflib.get_close_matches(
            name, [PurePosixPath(sibling).name for sibling in siblings], n=1
        )
        hint = f"did you mean {close[0]}?" if close else "check the path"
        raise GatesError(f"{url}: does not exist; {hint}")
    if filesystem.isdir(path):
        raise GatesError(
            f"{url}: is a directory without {', '.join(ZARR_MARKERS)}, expected a Zarr group or a "
            "NetCDF file; name the store inside it"
        )


def _open_zarr(
    filesystem: AbstractFileSystem, path: str, url: str, storage_options: dict[str, Any] | None
) -> xr.Dataset:
    try:
        consolidated = _is_consolidated(filesystem, path, url)
        dataset: xr.Dataset = xr.open_zarr(
            url,
            chunks=None,
            consolidated=consolidated,
            decode_timedelta=True,
            storage_options=storage_options,
        )
        return dataset
    except json.JSONDecodeError as error:
        raise GatesError(f"{url}: its Zarr metadata is not JSON; copy the store again") from error
    except Exception as error:  # zarr and its codecs raise errors of many types
        raise GatesError(
            f"{url}: cannot be read as Zarr: {_first_line(error)}; repair it or write it again"
        ) from error


def _is_consolidated(filesystem: AbstractFileSystem, path: str, url: str) -> bool:
    """Return whether the metadata of all arrays lie in one place."""
    if filesystem.exists(f"{path}/.zmetadata"):
        return True
    if filesystem.exists(f"{path}/zarr.json"):
        metadata = json.loads(filesystem.cat_file(f"{path}/zarr.json"))
        if metadata.get("node_type") == "group":
            return metadata.get("consolidated_metadata") is not None
    elif filesystem.exists(f"{path}/.zgroup"):
        return False
    raise GatesError(
        f"{url}: is a single Zarr array, expected a group with coordinates; name its parent"
    )


def _open_file(filesystem: AbstractFileSystem, path: str, url: str) -> xr.Dataset:
    head = filesystem.cat_file(path, end=8)
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise GatesError(f"{url}: is {what}")
    engine = next((name for magic, name in ENGINES.items() if head.startswith(magic)), None)
    if engine is None:
        size = filesystem.size(path)
        raise GatesError(
            f"{url}: is neither Zarr, NetCDF nor GRIB ({size} bytes, starting {head!r}); "
            + ("download it again" if size == 0 else "name another file or convert it")
        )
    if engine == "cfgrib" and find_spec("cfgrib") is None:
        raise GatesError(f"{url}: is GRIB, which needs cfgrib: pip install cfgrib")
    local = isinstance(filesystem, LocalFileSystem)
    try:
        return xr.open_dataset(
            path if local else filesystem.open(path),
            engine=engine,
            decode_timedelta=True,
            backend_kwargs=CFGRIB_OPTIONS if engine == "cfgrib" else None,
        )
    except Exception as error:  # each reader has its own types of errors
        _release(error)
        damaged = isinstance(error, OSError) or "reshape" in str(error)  # a NetCDF-3 array cut off
        fix = (
            "the file is truncated or damaged, download it again" if damaged else "repair the file"
        )
        if engine == "cfgrib":
            fix = "if it mixes kinds of levels or times, split it with grib_copy"
        raise GatesError(f"{url}: cannot be read: {_first_line(error)}; {fix}") from error


def _release(error: BaseException) -> None:
    """Close what a failed reader left open; scipy warns about a memory map that it has to drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traceback.clear_frames(error.__traceback__)
        gc.collect()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().strip("'\"").splitlines()
    return lines[0] if lines else type(error).__name__


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
        check: Judge the values of a few time steps (see `weather.data.axes.check_values`);
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
        horizontals = [
            str(name) for name, array in dataset.items() if horizontal <= set(array.dims)
        ]
        if not horizontals:
            raise GatesError("holds no variable on the grid; name a store with fields")
        return horizontals
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


LONG_NAMES = {short: name for name, short in SHORT_NAMES.items()}


def store_channels(
    source: str | os.PathLike[str], variables: Sequence[str] = (), levels: Sequence[int] = ()
) -> ChannelSpec:
    """Return the channels of a store: variables with a time, and their levels.

    Args:
        source: Path or URL of a store in the schema of WeatherBench 2.
        variables: Names of WeatherBench 2; those whose unit is known (`weather.variables`) if
            empty.
        levels: hPa; all of the store if empty.

    Raises:
        GatesError: A variable or a level is missing, or no known variable is there.
    """
    with open_store(source) as raw, naming(source):
        dataset = rename_axes(raw)
        fields = {
            LONG_NAMES.get(str(name), str(name)): array.dims
            for name, array in dataset.data_vars.items()
            if {"time", "latitude", "longitude"} <= set(array.dims)
        }
        held = ", ".join(sorted(fields)) or "none"
        if missing := [name for name in variables if name not in fields]:
            raise GatesError(
                f"variable {', '.join(missing)} is missing, found {held}; choose variables that "
                "exist"
            )
        wanted = list(variables) or [name for name in VARIABLES if name in fields]
        if not wanted:
            raise GatesError(
                f"holds no variable of {', '.join(VARIABLES)}, found {held}; name the variables "
                "(time, latitude, longitude) that are to be analyzed"
            )
        surface = tuple(name for name in wanted if "level" not in fields[name])
        upper = tuple(name for name in wanted if "level" in fields[name])
        if upper and "level" not in dataset.coords:
            raise GatesError("dimension level has no values; write its coordinate")
        stored = sorted(dataset["level"].values.tolist()) if upper else []
        if upper and levels:
            level_positions(dataset, levels)
        return ChannelSpec(surface, upper, tuple(levels or stored) if upper else ())


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
