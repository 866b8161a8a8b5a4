"""A store that is written field by field, so that it never has to fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from weather.data.write import consolidate, encoding_of


class StreamedStore:
    """A consolidated Zarr group (format 2) whose coordinates are there and whose fields come later.

    Fields are float32 in chunks of one horizontal field, all levels; what was not written is NaN.
    Writing the same values again leaves the same bytes.

    Args:
        path: Folder of a store that :meth:`create` made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group = zarr.open_group(path, mode="r+", zarr_format=2, use_consolidated=False)

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
        for name, found in encoding_of(whole.assign(empty)).items():
            if name in fields:
                group.create_array(
                    name,
                    shape=shapes[name],
                    chunks=found["chunks"],
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
        self._group[name][tuple(where)] = values.astype(np.float32, copy=False)

    def read(self, name: str, where: Sequence[int | slice]) -> np.ndarray:
        """Return a block of a field."""
        return np.asarray(self._group[name][tuple(where)])

    def resize(self, times: np.ndarray) -> None:
        """Give the store other times; of fields that are there, those of the first times stay."""
        seconds = times.astype("datetime64[s]").astype(np.int64)
        for name, array in self._group.arrays():
            dimensions = array.attrs.get("_ARRAY_DIMENSIONS", [])
            if dimensions and dimensions[0] == "time":
                array.resize((len(times), *array.shape[1:]))
                if name == "time":
                    array[:] = seconds
        consolidate(self.path)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes to those of the store."""
        self._group.attrs.update(attributes)
        consolidate(self.path)
