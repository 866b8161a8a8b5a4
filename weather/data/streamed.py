"""A store that is written field by field, so that it never has to fit into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor

from weather.data.tensors import to_dataset
from weather.data.write import canonical, consolidate, encoding_of
from weather.grid import Grid
from weather.state import ChannelSpec
from weather.variables import attributes_of


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
        """Return what :meth:`write_states` wrote, float32."""
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
    """Return a store with room for states, in the schema of `weather.data.write.write_wb2`.

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
