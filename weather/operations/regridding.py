"""A whole store on another grid, a block of fields at a time."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr

from core_gates.errors import GatesError
from harness.files import Partial, remove, resuming, short_digest
from weather.data.axes import DIMENSIONS, dataset_grid, horizontal_axes, read_values, rename_axes
from weather.data.store import naming, open_store
from weather.data.writing import ATTRIBUTES, HORIZONTAL, WHOLE, StreamedStore
from weather.grid import EXAMPLES, Grid, Method, Regridder, named_grid
from weather.progress import Progress, silent

BLOCK_BYTES = 64 * 2**20  # read at a time, as float32
SAVED_EVERY = 2.0  # seconds of work that a kill may cost
COORDINATES = ("latitude", "longitude")

Missing = Literal["propagate", "refuse"]
"""What becomes of values that are not finite."""


class Regridded(NamedTuple):
    """What was written.

    Attributes:
        path: The store.
        missing: Fraction of values that are missing, before and after, of every field where
            it is not 0.
        left_out: Variables that have one of latitude and longitude alone.
    """

    path: Path
    missing: dict[str, tuple[float, float]]
    left_out: list[str]


class _Block(NamedTuple):
    """Part of a field: an index or slice of each dimension before latitude and longitude."""

    name: str
    where: tuple[slice, ...]


def read_grid(source: str | os.PathLike[str]) -> Grid:
    """Return the grid of a store in its own order of rows, columns from 0 or from -180 eastwards.

    Raises:
        GatesError: There is no store, or its coordinates are not those of a global grid.
    """
    with open_store(source) as raw, naming(source):
        renamed = rename_axes(raw)
        grid = dataset_grid(horizontal_axes(renamed))
        with_own_order = [renamed[name].values.astype(np.float64) for name in COORDINATES]
    try:
        return Grid(*map(torch.from_numpy, with_own_order))
    except ValueError:  # longitudes such as 0 to 179, then -180 to -1
        return grid


def find_grid(text: str) -> tuple[Grid, Method | None]:
    """Return a grid by its name or of a store, and the method that the name states.

    Args:
        text: Such as ``240x121_equiangular_with_poles``, or a store whose grid is taken.

    Raises:
        GatesError: It is neither, or the coordinates of the store are not those of a global grid.
    """
    named = named_grid(text)
    if named is not None:
        return named
    if "://" not in text and not Path(text).exists():
        choices = [*EXAMPLES.split(", "), *map(str, Path().glob("*.zarr"))]
        close = difflib.get_close_matches(text, choices, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give such as {EXAMPLES}"
        raise GatesError(f"{text!r} is neither the name of a grid nor a store: {hint}")
    return read_grid(text), None


def regrid_store(
    source: str | os.PathLike[str],
    target: Grid,
    path: Path,
    *,
    method: Method = "conservative",
    missing: Missing = "propagate",
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Regridded:
    """Write all fields of a store on another grid, float32, a block in memory at a time.

    A field is what has latitude and longitude, whatever its other dimensions are: analyses,
    forecasts, ensembles, climatologies and static fields. Other variables, coordinates and all
    attributes are copied. A call that is killed is continued by the same call.

    Args:
        source: Path or URL of a store as `weather.data.store.open_store` takes it.
        target: Grid of the result.
        path: Store that is written, Zarr format 2, consolidated.
        method: See `weather.grid.Regridder`.
        missing: ``propagate`` makes NaN of every point to which a value contributes that is not
            finite; ``refuse`` stops there.
        attributes: Further attributes of the result.
        overwrite: Replace an existing store.
        progress: Shows how far the work is.

    Raises:
        GatesError: The source is not a store on a global grid, is damaged or has values that are
            not finite and are to be refused; or the path is taken, or is that of the source.
    """
    with open_store(source) as raw:
        with naming(source):
            dataset = _fields_last(horizontal_axes(rename_axes(raw)))
            fields = _fields(dataset)
        regridder = Regridder(dataset_grid(dataset), target, method)
        settings = {"source": os.fspath(source), "content": _digest(dataset), "method": method,
                    "missing": missing, "latitude": target.latitude.tolist(),
                    "longitude": target.longitude.tolist()}  # fmt: skip
        with resuming(path, settings, overwrite=overwrite) as partial:
            if not partial.state:
                remove(partial.content)
                facts = {**_said(source, regridder), **(attributes or {})}
                _create(partial.content, dataset, fields, target, facts)
            work = _Work(dataset, fields, regridder, missing)
            with naming(source):
                work.run(partial, progress)
            counts = partial.state["missing"]
    sizes = {name: _sizes(dataset, dims, target) for name, dims in fields.items()}
    return Regridded(
        path,
        {
            name: (counts[name][0] / sizes[name][0], counts[name][1] / sizes[name][1])
            for name in fields
            if any(counts[name])
        },
        _left_out(dataset),
    )


class _Work:
    """Regrids the blocks of all fields, one after the other."""

    def __init__(
        self,
        dataset: xr.Dataset,
        fields: Mapping[str, Sequence[str]],
        regridder: Regridder,
        missing: Missing,
    ) -> None:
        self.dataset, self.regridder, self.missing = dataset, regridder, missing
        self.blocks = [
            block for name, dims in fields.items() for block in _blocks(dataset, name, dims)
        ]

    def run(self, partial: Partial, progress: Progress) -> None:
        """Write every block that a run that was stopped has not saved, and count what is missing.

        Args:
            partial: The unfinished store, with the number of blocks that it holds for good.
            progress: A tick a block.

        Raises:
            GatesError: A value is missing where that is to be refused.
        """
        store, done = StreamedStore(partial.content), partial.state.get("blocks", 0)
        counts = {block.name: [0, 0] for block in self.blocks} | partial.state.get("missing", {})
        saved = time.monotonic()
        with progress("regridding", len(self.blocks)) as tick:
            for number, block in enumerate(self.blocks, 1):
                if number <= done:
                    tick()
                    continue
                values, missing = self._regrid(block)
                store.write(block.name, values, block.where)
                for index, count in enumerate(missing):
                    counts[block.name][index] += count
                if number == len(self.blocks) or time.monotonic() - saved > SAVED_EVERY:
                    partial.save({"blocks": number, "missing": counts})
                    saved = time.monotonic()
                tick()

    def _regrid(self, block: _Block) -> tuple[np.ndarray, tuple[int, int]]:
        """Regrid a block, and count what was and is not finite, unless nothing depends on it."""
        array = self.dataset[block.name]
        values = read_values(array.isel(dict(zip(array.dims, block.where, strict=False))))
        kind = np.float64 if values.dtype == np.float64 else np.float32
        values = np.ascontiguousarray(values, kind)
        regridded = self.regridder(torch.from_numpy(values)).numpy()
        after = int(np.count_nonzero(~np.isfinite(regridded)))
        before = int(np.count_nonzero(~np.isfinite(values))) if after else 0
        if after and self.missing == "refuse":
            raise GatesError(
                f"{block.name} is missing (NaN) in {100 * before / values.size:.3g} % of the "
                "values of a block; fill them, or let them propagate with --missing propagate"
            )
        return regridded, (before, after)


def _fields_last(dataset: xr.Dataset) -> xr.Dataset:
    """Order the dimensions: unknown ones, those of a store, latitude and longitude last."""
    order = [dim for dim in dataset.dims if dim not in DIMENSIONS]
    return dataset.transpose(*order, *[dim for dim in DIMENSIONS if dim in dataset.dims])


def _fields(dataset: xr.Dataset) -> dict[str, list[str]]:
    """Return the dimensions of every variable on the grid."""
    fields = {
        str(name): [str(dim) for dim in array.dims]
        for name, array in dataset.items()
        if set(HORIZONTAL) <= set(array.dims)
    }
    if not fields:
        raise GatesError("holds no variable on the grid; name a store with fields")
    for name in fields:
        kind = dataset[name].dtype
        if not any(np.issubdtype(kind, numeric) for numeric in (np.integer, np.floating, np.bool_)):
            raise GatesError(f"{name} holds {kind}, expected real numbers; convert it")
        if 0 in dataset[name].shape:
            raise GatesError(f"{name} is empty; choose a store with data")
    return fields


def _left_out(dataset: xr.Dataset) -> list[str]:
    return [
        str(name) for name, array in dataset.items() if len(set(HORIZONTAL) & set(array.dims)) == 1
    ]


def _create(
    path: Path,
    dataset: xr.Dataset,
    fields: Mapping[str, Sequence[str]],
    target: Grid,
    facts: Mapping[str, Any],
) -> None:
    """Write the store without its fields."""
    tied = [
        name
        for name, array in dataset.variables.items()
        if set(HORIZONTAL) & set(array.dims) and name not in fields
    ]
    whole = dataset.drop_vars([*tied, *fields]).drop_encoding()
    whole = whole.assign({name: ((), 0.0, dict(dataset[name].attrs)) for name in fields})
    coordinates = {name: (name, getattr(target, name).numpy(), ATTRIBUTES[name])
                   for name in COORDINATES}  # fmt: skip
    whole = whole.assign_coords(coordinates).assign_attrs(facts)
    StreamedStore.create(path, whole, fields)


def _said(source: str | os.PathLike[str], regridder: Regridder) -> dict[str, str]:
    rows, columns = regridder.source.shape
    return {"regridded_from": os.fspath(source), "regridding": f"{regridder.method}, from "
            f"{columns}x{rows} longitudes by latitudes"}  # fmt: skip


def _blocks(dataset: xr.Dataset, name: str, dims: Sequence[str]) -> Iterator[_Block]:
    """Yield the blocks of a field, each of consecutive entries of its dimensions."""
    leading = [dim for dim in dims if dim not in HORIZONTAL]
    size = 4 * math.prod(dataset.sizes[dim] for dim in HORIZONTAL)
    lengths = []
    for dim in reversed(leading):
        extent = dataset.sizes[dim]
        length = extent if dim in WHOLE else max(1, min(extent, BLOCK_BYTES // size))
        lengths.append(length)
        size *= length
    steps = [
        [slice(start, min(start + length, dataset.sizes[dim])) for start in
         range(0, dataset.sizes[dim], length)]
        for dim, length in zip(leading, reversed(lengths), strict=True)
    ]  # fmt: skip
    for where in itertools.product(*steps):
        yield _Block(name, where)


def _sizes(dataset: xr.Dataset, dims: Sequence[str], target: Grid) -> tuple[int, int]:
    others = math.prod(dataset.sizes[dim] for dim in dims if dim not in HORIZONTAL)
    source = math.prod(dataset.sizes[dim] for dim in HORIZONTAL)
    return others * source, others * math.prod(target.shape)


def _digest(dataset: xr.Dataset) -> str:
    """Return what identifies a store without reading its fields."""
    coordinates = {str(name): array.values.astype(str).tolist()
                   for name, array in dataset.coords.items() if array.ndim <= 1}  # fmt: skip
    shapes = {str(name): [str(array.dtype), *array.shape] for name, array in dataset.items()}
    return short_digest([coordinates, shapes])
