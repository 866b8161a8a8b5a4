"""Between labeled datasets and channel tensors, by variable name and level value."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from weather.data.axes import level_positions, read_values
from weather.grid import Grid
from weather.state import ChannelSpec

LEADING = ("time", "prediction_timedelta", "number")


def to_tensor(dataset: xr.Dataset, channels: ChannelSpec, *, allow_missing: bool = False) -> Tensor:
    """Stack the fields of a dataset into channels, reading levels by their value.

    Only what is asked for is read; select times before the call.

    Args:
        dataset: Dimensions among time, prediction_timedelta, number, level, latitude, longitude
            in any order.
        channels: Variables and levels, in the order of the result.
        allow_missing: Leave missing values as NaN instead of refusing them.

    Returns:
        float32 (T[, lead][, N], C, H, W), one leading dimension for each that the dataset has.

    Raises:
        GatesError: If a variable, a level or a value is missing, or a part of the store is damaged;
            without the name of the store, see `weather.data.store.naming`.
    """
    missing = [name for name in (*channels.surface, *channels.upper) if name not in dataset]
    if missing:
        raise GatesError(
            f"variable {', '.join(missing)} is missing, found "
            f"{', '.join(sorted(map(str, dataset.data_vars)))}; choose channels that exist"
        )
    leading = [name for name in LEADING if name in dataset.dims]
    sizes = tuple(dataset.sizes[name] for name in leading)
    shape = (*sizes, dataset.sizes["latitude"], dataset.sizes["longitude"])
    fields = [
        np.broadcast_to(read_values(_ordered(dataset[name], leading)), shape)
        for name in channels.surface
    ]
    if channels.upper:
        positions = level_positions(dataset, channels.levels)
        for name in channels.upper:
            array = read_values(_ordered(dataset[name].isel(level=positions), [*leading, "level"]))
            fields += [array[..., index, :, :] for index in range(len(positions))]
    stacked = np.stack(fields, axis=len(leading)).astype(np.float32, copy=False)
    if not allow_missing:
        _require_finite(stacked, channels)
    return torch.from_numpy(stacked)


def dataset_grid(dataset: xr.Dataset) -> Grid:
    """Return the grid of a dataset."""
    coordinates = (dataset[name].values.astype(np.float64) for name in ("latitude", "longitude"))
    return Grid(*map(torch.from_numpy, coordinates))


def to_dataset(
    states: Tensor,
    channels: ChannelSpec,
    grid: Grid,
    *,
    times: np.ndarray,
    leads: np.ndarray | None = None,
) -> xr.Dataset:
    """Label states with WeatherBench-2 names; the inverse of `to_tensor`.

    Args:
        states: (T[, lead][, N], C, H, W).
        channels: The C channels.
        grid: The H latitudes and W longitudes.
        times: (T,) datetime64, the analysis or initial times.
        leads: (lead,) timedelta64 if the states are forecasts.

    Raises:
        ValueError: If the shape and the coordinates disagree.
    """
    leading = ["time"] + (["prediction_timedelta"] if leads is not None else [])
    if states.ndim == len(leading) + 4:
        leading.append("number")
    expected = (channels.num_channels, *grid.shape)
    if states.ndim != len(leading) + 3 or tuple(states.shape[-3:]) != expected:
        raise ValueError(
            f"states have shape {tuple(states.shape)}, expected ({', '.join(leading)}, *{expected})"
        )
    coordinates: dict[str, np.ndarray | Sequence[int]] = {
        "time": np.asarray(times, dtype="datetime64[ns]"),
        "latitude": grid.latitude.numpy(),
        "longitude": grid.longitude.numpy(),
    }
    if leads is not None:
        coordinates["prediction_timedelta"] = np.asarray(leads, dtype="timedelta64[ns]")
    if "number" in leading:
        coordinates["number"] = np.arange(states.shape[len(leading) - 1])
    surface, upper = channels.split(states.detach().cpu().float())
    horizontal = ("latitude", "longitude")
    variables = {
        name: ((*leading, *horizontal), surface[..., index, :, :].numpy())
        for index, name in enumerate(channels.surface)
    }
    if channels.upper:
        coordinates["level"] = np.asarray(channels.levels, dtype=np.int64)
        for index, name in enumerate(channels.upper):
            variables[name] = ((*leading, "level", *horizontal), upper[..., index, :, :, :].numpy())
    return xr.Dataset(variables, coordinates)


def _require_finite(fields: np.ndarray, channels: ChannelSpec) -> None:
    missing = ~np.isfinite(fields)
    if missing.any():
        shares = np.moveaxis(missing, -3, 0).reshape(channels.num_channels, -1).mean(axis=1)
        worst = int(shares.argmax())
        raise GatesError(
            f"{channels.labels[worst]} is missing (NaN) in {100 * shares[worst]:.3g} % of the "
            "values read; fill them or choose another period"
        )


def _ordered(array: xr.DataArray, leading: Sequence[str]) -> xr.DataArray:
    """Return the array with its dimensions in canonical order, absent ones as size 1."""
    order = (*leading, "latitude", "longitude")
    return array.expand_dims([name for name in order if name not in array.dims]).transpose(*order)
