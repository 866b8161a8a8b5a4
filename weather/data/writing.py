"""Writing analyses and forecasts in the schema of WeatherBench 2, at once or field by field."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.data.axes import DIMENSIONS, to_dataset
from weather.grid import Grid
from weather.state import ChannelSpec
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
            example from `weather.data.axes.to_dataset`. Its attributes are kept; conventions,
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
        yield block.assign(
            {
                name: array.astype(np.float32).assign_attrs(dict(attributes_of(str(name))))
                for name, array in block.items()
            }
        )


def _append(block: xr.Dataset, path: Path, zarr_format: Literal[2, 3]) -> None:
    if path.exists():
        block.to_zarr(path, append_dim="time", consolidated=False, zarr_format=zarr_format)
        return
    block.to_zarr(
        path, mode="w-", encoding=encoding_of(block), consolidated=False, zarr_format=zarr_format
    )


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


class StreamedStore:
    """A consolidated Zarr group (format 2) whose coordinates are there and whose fields come later.

    Fields are float32 in chunks of one horizontal field, all levels; what was not written is NaN.
    Writing the same values again leaves the same bytes.

    Args:
        path: Folder of a store that `create` made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group = zarr.open_group(path, mode="r+", zarr_format=2, use_consolidated=False)
        self._arrays = dict(self._group.arrays())

    @classmethod
    def create(
        cls, path: Path, dataset: xr.Dataset, fields: Mapping[str, Sequence[str]]
    ) -> StreamedStore:
        """Write coordinates, attributes and whole variables, and make room for fields.

        Args:
            path: Folder, which must not exist.
            dataset: Coordinates, attributes, and variables that are written now. Attributes of a
                field are those of a scalar variable of its name.
            fields: Dimensions of every field by its name, latitude and longitude last.
        """
        shapes = {name: tuple(dataset.sizes[dim] for dim in dims) for name, dims in fields.items()}
        empty = {
            name: (tuple(dims), np.broadcast_to(np.float32(np.nan), shapes[name]))
            for name, dims in fields.items()
        }
        attributes = {name: dict(dataset[name].attrs) for name in fields if name in dataset}
        whole = dataset.drop_vars(attributes)
        whole.to_zarr(
            path, mode="w-", encoding=encoding_of(whole), consolidated=False, zarr_format=2
        )
        group = zarr.open_group(path, mode="r+", zarr_format=2, use_consolidated=False)
        for name, encoding in encoding_of(whole.assign(empty)).items():
            if name in fields:
                group.create_array(
                    name,
                    shape=shapes[name],
                    chunks=encoding["chunks"],
                    dtype="float32",
                    fill_value=np.nan,
                    attributes={
                        **attributes.get(name, {}),
                        "_ARRAY_DIMENSIONS": list(fields[name]),
                    },
                )
        consolidate(path)
        return cls(path)

    def write(self, name: str, values: np.ndarray, where: Sequence[int | slice]) -> None:
        """Write a block of a field.

        Args:
            name: Of the field.
            values: In the shape of the block.
            where: Index or slice of each dimension before latitude and longitude, from the first.
        """
        self._arrays[name][tuple(where)] = values.astype(np.float32, copy=False)

    def write_states(
        self, states: Tensor, channels: ChannelSpec, where: Sequence[int | slice]
    ) -> None:
        """Write states as the fields of their channels.

        Args:
            states: (..., C, H, W), in the shape of the block before the channels.
            channels: The C channels.
            where: Index or slice of each dimension before the level.
        """
        surface, upper = channels.split(states.detach().cpu().float())
        for index, name in enumerate(channels.surface):
            self.write(name, surface[..., index, :, :].numpy(), where)
        for index, name in enumerate(channels.upper):
            self.write(name, upper[..., index, :, :, :].numpy(), where)

    def read_states(self, channels: ChannelSpec, where: Sequence[int | slice]) -> Tensor:
        """Return what `write_states` wrote, float32."""
        surface = [self.read(name, where)[..., None, :, :] for name in channels.surface]
        upper = [self.read(name, where) for name in channels.upper]
        return torch.from_numpy(np.concatenate([*surface, *upper], axis=-3))

    def read(self, name: str, where: Sequence[int | slice]) -> np.ndarray:
        """Return a block of a field."""
        return np.asarray(self._arrays[name][tuple(where)])

    def resize(self, times: np.ndarray) -> None:
        """Give the store other times; of fields that are there, those of the first times stay."""
        seconds = times.astype("datetime64[s]").astype(np.int64)
        for name, array in self._arrays.items():
            dimensions = array.attrs.get("_ARRAY_DIMENSIONS")
            if isinstance(dimensions, list) and dimensions[:1] == ["time"]:
                array.resize((len(times), *array.shape[1:]))
                if name == "time":
                    array[:] = seconds
        consolidate(self.path)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes to those of the store."""
        self._group.attrs.update(attributes)
        consolidate(self.path)


def create_states(
    path: Path,
    channels: ChannelSpec,
    grid: Grid,
    *,
    times: np.ndarray,
    leads: np.ndarray | None = None,
    members: int | None = None,
    attributes: Mapping[str, Any],
) -> StreamedStore:
    """Return a store with room for states, in the schema of `weather.data.writing.write_wb2`.

    Args:
        path: Folder, which must not exist.
        channels: Variables and levels.
        grid: Of the fields.
        times: (T,) datetime64, of the analyses or the starts of the forecasts.
        leads: (lead,) timedelta64 if the states are forecasts.
        members: Size of the ensemble; None for no dimension ``number``.
        attributes: Of the store.
    """
    leading = [len(times), *([] if leads is None else [len(leads)])]
    leading += [] if members is None else [members]
    empty = torch.zeros(()).expand(*leading, channels.num_channels, *grid.shape)
    shapes = canonical(to_dataset(empty, channels, grid, times=times, leads=leads))
    fields = {str(name): [str(dim) for dim in array.dims] for name, array in shapes.items()}
    scalars = {name: ((), 0.0, dict(attributes_of(name))) for name in fields}
    dataset = xr.Dataset(scalars, shapes.coords, {**shapes.attrs, **attributes})
    return StreamedStore.create(path, dataset, fields)


def differences(found: str, expected: str) -> str:
    """Return which facts differ, such as ``cycles 24 instead of 420``.

    Args:
        found: JSON object, as read from a file; anything else is named as it is.
        expected: JSON object.
    """
    try:
        left, right = _facts(json.loads(found)), _facts(json.loads(expected))
    except (ValueError, AttributeError):
        return f"{found} instead of {expected}"
    names = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    return ", ".join(
        f"{name} {left.get(name, 'absent')} instead of {right.get(name, 'absent')}"
        for name in names
    )


def _facts(content: dict[str, Any]) -> dict[str, Any]:
    """Return the facts, the arguments of a description ``Name(a=1, b=2)`` one by one."""
    facts: dict[str, Any] = {}
    for name, value in content.items():
        described = re.fullmatch(r"(\w+)\((.*)\)", value) if isinstance(value, str) else None
        if described is None:
            facts[name] = value
            continue
        facts[name] = described[1]
        for argument in described[2].split(", "):
            key, _, setting = argument.partition("=")
            facts[f"{name}.{key}"] = setting
    return facts
