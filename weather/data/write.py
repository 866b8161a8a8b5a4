"""Writing analyses and forecasts in the schema of WeatherBench 2, whole or not at all."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr

from core_gates.errors import GatesError
from harness.files import replacing
from weather.data.axes import DIMENSIONS
from weather.variables import attributes_of

BLOCK_BYTES = 256 * 2**20  # held in memory at a time
CONVENTIONS = "CF-1.11"
HORIZONTAL = ("latitude", "longitude")
WHOLE = ("level", *HORIZONTAL)  # dimensions that a chunk holds whole
EPOCH = "seconds since 1970-01-01"
ATTRIBUTES = {
    "latitude": {"units": "degrees_north", "standard_name": "latitude", "axis": "Y"},
    "longitude": {"units": "degrees_east", "standard_name": "longitude", "axis": "X"},
    "time": {"standard_name": "time", "axis": "T"},
    "level": {"axis": "Z", "positive": "down"},
    "number": {"units": "1", "standard_name": "realization"},
}


def write_wb2(
    dataset: xr.Dataset,
    path: str | os.PathLike[str],
    *,
    zarr_format: Literal[2, 3] = 2,
    overwrite: bool = False,
) -> Path:
    """Write a consolidated Zarr group that WeatherBench 2 reads, replacing an old one at the end.

    Everything goes to a hidden folder next to the target, which is renamed when complete: a write
    that fails or is killed leaves the old store as it was. Fields are read and written block by
    block, so a lazy dataset may exceed the memory.

    Args:
        dataset: float variables with the dimensions time (the initial time of a forecast),
            optionally prediction_timedelta, number and level, then latitude and longitude, for
            example from `weather.data.tensors.to_dataset`. Its attributes are kept; conventions,
            units and standard names are set.
        path: Folder of the store, by habit ``NAME.zarr``.
        zarr_format: 2 is read by every tool, 3 is the newer one.
        overwrite: Replace an existing store.

    Returns:
        The path. Fields are float32 in chunks of one global field (all levels) of one time, lead
        and member; times are int64 seconds, leads int64 nanoseconds.

    Raises:
        GatesError: If the path is taken or remote, or the dimensions do not fit the schema.
    """
    if "://" in str(path):
        raise GatesError(f"{path} is a URL, expected a local folder; write there and copy it")
    target = Path(path)
    checked = canonical(dataset)
    with replacing(target) as partial:
        if target.exists() and not overwrite:
            raise GatesError(f"{target} exists; choose another path or overwrite it")
        for block in _blocks(checked):
            _append(block, partial, zarr_format)
        consolidate(partial, zarr_format)
    return target


def canonical(dataset: xr.Dataset) -> xr.Dataset:
    """Check the dimensions, order them, and set types and attributes."""
    absent = [name for name in ("time", "latitude", "longitude") if name not in dataset.dims]
    unknown = [str(name) for name in dataset.dims if name not in DIMENSIONS]
    if absent or unknown:
        raise GatesError(
            f"dataset has the dimensions {', '.join(map(str, dataset.dims))}, expected "
            f"{', '.join(DIMENSIONS)} (time, latitude and longitude at least); rename or add them"
        )
    if dataset.sizes["time"] == 0 or not dataset.data_vars:
        raise GatesError("dataset holds no fields; nothing is written")
    incomplete = [
        str(name)
        for name, array in dataset.items()
        if not {"time", "latitude", "longitude"} <= set(array.dims)
    ]
    if incomplete:
        raise GatesError(
            f"{', '.join(incomplete)} lacks time, latitude or longitude; drop it or add them"
        )
    dataset = dataset.transpose(*[name for name in DIMENSIONS if name in dataset.dims])
    dataset = dataset.drop_vars([name for name in dataset.coords if name not in DIMENSIONS])
    for name, unit in (("time", "datetime64[ns]"), ("prediction_timedelta", "timedelta64[ns]")):
        if name in dataset.dims:
            dataset = dataset.assign_coords({name: dataset[name].values.astype(unit)})
    if "level" in dataset.dims:
        dataset = dataset.assign_coords(level=dataset["level"].values.astype(np.int64))
    for axis in map(str, dataset.coords):
        dataset[axis].attrs = dict(ATTRIBUTES.get(axis, {}))
    return dataset.assign_attrs(Conventions=CONVENTIONS).drop_encoding()


def _blocks(dataset: xr.Dataset) -> Iterator[xr.Dataset]:
    """Yield the dataset as float32 in pieces of consecutive times."""
    times = dataset.sizes["time"]
    length = max(1, BLOCK_BYTES * times // max(dataset.nbytes, 1))
    for start in range(0, times, length):
        block = dataset.isel(time=slice(start, start + length))
        fields = {}
        for name, array in block.items():
            attributes = dict(attributes_of(str(name)))
            fields[name] = array.astype(np.float32).assign_attrs(attributes)
        yield block.assign(fields)


def _append(block: xr.Dataset, path: Path, zarr_format: Literal[2, 3]) -> None:
    if path.exists():
        block.to_zarr(path, append_dim="time", consolidated=False, zarr_format=zarr_format)
        return
    encoding = encoding_of(block)
    block.to_zarr(path, mode="w-", encoding=encoding, consolidated=False, zarr_format=zarr_format)


def encoding_of(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """Return types and chunks of a store: one horizontal field, all levels, to a chunk."""
    encoding: dict[str, dict[str, Any]] = {}
    for name, array in dataset.coords.items():
        if np.issubdtype(array.dtype, np.datetime64):
            encoding[str(name)] = {
                "units": EPOCH,
                "dtype": "int64",
                "calendar": "proleptic_gregorian",
            }
        elif np.issubdtype(array.dtype, np.timedelta64):
            encoding[str(name)] = {"units": "nanoseconds", "dtype": "int64"}
    for name, array in dataset.items():
        chunks = [size if dim in WHOLE else 1 for dim, size in array.sizes.items()]
        if set(HORIZONTAL) <= set(array.dims):
            encoding[str(name)] = {"chunks": tuple(chunks), "_FillValue": np.float32(np.nan)}
    return encoding


def consolidate(path: Path, zarr_format: Literal[2, 3] = 2) -> None:
    """Copy all metadata to one place; zarr warns that format 3 does not specify where."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
        zarr.consolidate_metadata(str(path), zarr_format=zarr_format)
