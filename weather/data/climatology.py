"""Statistics and daily climatology of states that do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dask
import dask.array
import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.grid import Grid
from weather.progress import Tick, no_tick
from weather.state import ChannelSpec
from weather.variables import attributes_of

THREADS = 2
"""Frames in memory at a time, each next to one field in float64."""


class Statistics(NamedTuple):
    """Of every channel (C,), float64: mean and standard deviation."""

    mean: np.ndarray
    sd: np.ndarray


def channel_statistics(
    frames: Any, area_weights: Tensor, positions: Sequence[int] | np.ndarray | None = None
) -> Statistics:
    """Return area-weighted mean and standard deviation, from moments of every frame.

    The moments of two sets of frames combine without a loss of digits (Chan, Golub and LeVeque
    1983).

    Args:
        frames: (T,C,H,W), a Zarr or a NumPy array.
        area_weights: (H,), mean 1.
        positions: Times that count, all if None.
    """
    moments = _reduced(_Moments(area_weights.numpy()), _lazy(frames, positions))  # (T, 2, C)
    mean = moments[:, 0].mean(0)
    return Statistics(mean, np.sqrt((moments[:, 1] + (moments[:, 0] - mean) ** 2).mean(0)))


def root_mean_square_difference(
    frames: Any,
    others: Any,
    area_weights: Tensor,
    pairs: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return the root mean square (C,) of the differences of frames, such as background errors.

    Args:
        frames: (T,C,H,W), a Zarr or a NumPy array.
        others: Another one, (T',C,H,W).
        area_weights: (H,), mean 1.
        pairs: Positions (N,) in the first and in the second array.
    """
    first, second = _lazy(frames, pairs[0]), _lazy(others, pairs[1])
    squares = _reduced(_SquareDifference(area_weights.numpy()), first, second)  # (N, 1, C)
    return np.asarray(np.sqrt(squares[:, 0].mean(0)))


class _Moments:
    """Mean and variance (N,2,C) of each frame, channel by channel in float64."""

    rows = 2

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights[:, None] / weights.sum()

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        sums = np.empty((len(frames), 2, frames.shape[1]))
        for place in np.ndindex(frames.shape[:2]):
            field = frames[place].astype(np.float64)
            weights = self.weights / field.shape[1]
            mean = (field * weights).sum()
            sums[place[0], :, place[1]] = mean, ((field - mean) ** 2 * weights).sum()
        return sums


class _SquareDifference:
    """Mean square difference (N,1,C) of each pair of frames."""

    rows = 1

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights[:, None] / weights.sum()

    def __call__(self, frames: np.ndarray, others: np.ndarray) -> np.ndarray:
        squares = np.empty((len(frames), 1, frames.shape[1]))
        for place in np.ndindex(frames.shape[:2]):
            gap = frames[place].astype(np.float64) - others[place]
            squares[place[0], 0, place[1]] = (gap**2 * self.weights / gap.shape[1]).sum()
        return squares


def _lazy(frames: Any, positions: Sequence[int] | np.ndarray | None) -> dask.array.Array:
    """Return frames as a Dask array, a frame to a chunk."""
    whole = dask.array.from_array(frames, chunks=(1, *frames.shape[1:]))
    return whole if positions is None else whole[np.asarray(positions)]


def _reduced(function: Any, *arrays: dask.array.Array) -> np.ndarray:
    """Return what a function makes of each frame, (N, rows, C)."""
    count, channels = arrays[0].shape[:2]
    if not count:
        raise ValueError("cannot compute statistics: there is no frame")
    blocks = dask.array.map_blocks(
        function,
        *arrays,
        dtype=np.float64,
        chunks=(arrays[0].chunks[0], (function.rows,), (channels,)),
        drop_axis=(2, 3),
        new_axis=(1,),
        meta=np.empty((0, 0, 0)),
    )
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        return np.asarray(blocks.compute())


DAYS = 366  # day 60 is 29 February in leap years, and day 366 exists in them alone
WINDOW_DAYS = 61


class Calendar(NamedTuple):
    """Where the times of a series belong.

    Attributes:
        hours: Hours of the day that occur, ascending.
        hour: (T,) index in ``hours``.
        day: (T,) day of the year, from 0.
    """

    hours: tuple[int, ...]
    hour: np.ndarray
    day: np.ndarray

    @classmethod
    def of(cls, times: np.ndarray) -> Calendar:
        """Return the calendar of times (T,), datetime64."""
        days = times.astype("datetime64[D]")
        day = (days - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)
        hour = (times.astype("datetime64[h]") - days.astype("datetime64[h]")).astype(int)
        hours, index = np.unique(hour, return_inverse=True)
        return cls(tuple(hours.tolist()), index, day)


def daily_climatology(
    frames: Any,
    times: np.ndarray,
    positions: Sequence[int] | np.ndarray | None = None,
    *,
    window_days: int = WINDOW_DAYS,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the climatology of every hour and day of the year: the weighted mean of days around.

    The weight falls linearly from 1 on the day itself to 0 beyond half a window, around the end of
    the year; every frame of these days counts alike, whatever its year. Sums run from day to day: a
    triangle moves by one day when what lies ahead of it is added and what it has passed is taken
    away, so that few frames are in memory at a time, and each is read three times.

    Args:
        frames: (T,C,H,W), a Zarr or a NumPy array.
        times: (T,) datetime64.
        positions: Times that count, all if None.
        window_days: Odd number of days.

    Yields:
        Hour of the day, day of the year from 0, mean (C,H,W) in float64. A day without any frame in
        its window is left out.

    Raises:
        ValueError: The window is even, negative or longer than a year, or there is no frame.
    """
    if not (window_days % 2 and 0 < window_days < DAYS):
        raise ValueError(f"window_days is {window_days}, expected an odd number of days below 366")
    every = np.arange(len(times)) if positions is None else np.asarray(positions)
    if not len(every):
        raise ValueError("cannot compute a climatology: there is no frame")
    calendar = Calendar.of(times[every])
    for number, hour in enumerate(calendar.hours):
        of_hour = calendar.hour == number

        def bin_of(day: int, own: np.ndarray = of_hour) -> tuple[np.ndarray, int]:
            of_day = every[own & (calendar.day == day % DAYS)]
            return _total(frames, of_day), len(of_day)

        for day, mean in _running(bin_of, window_days // 2):
            yield hour, day, mean


def _total(frames: Any, positions: np.ndarray) -> np.ndarray:
    """Return the sum (C,H,W) of some frames in float64."""
    total = np.zeros(frames.shape[1:])
    for position in positions.tolist():
        total += np.asarray(frames[position])
    return total


class _Sum:
    """A sum of frames and their number that grows and shrinks."""

    def __init__(self, total: np.ndarray, count: int) -> None:
        self.total, self.count = total, count

    def add(self, other: tuple[np.ndarray, int], sign: int = 1) -> None:
        self.total += other[0] if sign > 0 else -other[0]
        self.count += sign * other[1]


def _running(
    bin_of: Callable[[int], tuple[np.ndarray, int]], half: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the mean of each day under a triangle of ``half`` days on either side.

    With S(d) the sum of day d and h = half + 1, the triangle T(d) = sum (1 - |k| / h) S(d + k)
    obeys h (T(d + 1) - T(d)) = sum of S from d + 1 to d + h, minus sum from d - half to d.
    """
    reach = half + 1
    triangle = _Sum(*(np.zeros_like(bin_of(0)[0]), 0))
    ahead, passed = (_Sum(np.zeros_like(triangle.total), 0) for _ in range(2))
    for offset in range(-half, reach + 1):
        daily = bin_of(offset)
        weight = reach - abs(offset)
        triangle.add((weight * daily[0], weight * daily[1]))
        (ahead if offset > 0 else passed).add(daily)
    for day in range(DAYS):
        if triangle.count > 0:
            yield day, triangle.total / triangle.count
        triangle.add((ahead.total, ahead.count))
        triangle.add((passed.total, passed.count), -1)
        nearest, oldest = bin_of(day + 1), bin_of(day - half)
        ahead.add(nearest, -1)
        ahead.add(bin_of(day + reach + 1))
        passed.add(nearest)
        passed.add(oldest, -1)


def write_climatology(
    path: Path,
    frames: Any,
    channels: ChannelSpec,
    grid: Grid,
    times: np.ndarray,
    positions: Sequence[int] | np.ndarray | None = None,
    *,
    window_days: int = WINDOW_DAYS,
    attributes: dict[str, Any] | None = None,
    tick: Tick = no_tick,
) -> Path:
    """Write `daily_climatology` in the layout of WeatherBench 2, whole or not at all.

    Variables (hour, dayofyear[, level], latitude, longitude), float32, under the names of the data,
    days of the year from 1; days without data are NaN.

    Args:
        path: Folder of the Zarr store.
        frames: (T,C,H,W).
        channels: The C channels.
        grid: The H latitudes and W longitudes.
        times: (T,) datetime64.
        positions: Times that count, all if None.
        window_days: Odd number of days.
        attributes: Of the store.
        tick: Called for every hour and day.
    """
    hours = Calendar.of(times if positions is None else times[np.asarray(positions)]).hours
    with replacing(path) as partial:
        _empty(channels, grid, hours, attributes or {}).to_zarr(
            partial, compute=False, zarr_format=2, consolidated=True,
            encoding={name: {"_FillValue": np.float32(np.nan)} for name in _names(channels)},
        )  # fmt: skip
        group = zarr.open_group(partial, mode="r+", use_consolidated=False)
        arrays: dict[str, Any] = {name: group[name] for name in _names(channels)}
        for hour, day, mean in daily_climatology(frames, times, positions, window_days=window_days):
            surface, upper = channels.split(torch.from_numpy(mean.astype(np.float32)))
            place = hours.index(hour), day
            for name, field in zip(_names(channels), (*surface, *upper), strict=True):
                arrays[name][place] = field.numpy()
            tick()
    return path


def read_climatology(path: Path, channels: ChannelSpec, time: np.datetime64) -> Tensor:
    """Return the climatology (C,H,W) of a time, float32.

    Raises:
        GatesError: The store is missing or damaged, or has no data of that day and hour.
    """
    calendar = Calendar.of(np.asarray([time]))
    try:
        with xr.open_zarr(path, chunks=None, consolidated=True) as dataset:
            day = dataset.sel(hour=calendar.hours[0], dayofyear=int(calendar.day[0]) + 1)
            fields = [day[name].values for name in channels.surface]
            fields += [level for name in channels.upper for level in day[name].values]
    except Exception as error:  # readers raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(
            f"{path}: no climatology of {np.datetime_as_string(time, unit='m')} can be read "
            f"({reason}): delete it, so that it is made again"
        ) from error
    mean = torch.from_numpy(np.stack(fields))
    if not bool(mean.isfinite().all()):
        raise GatesError(
            f"{path} has no data of {np.datetime_as_string(time, unit='m')}, a day and hour far "
            "from all training times: give more training times or a longer window_days"
        )
    return mean


def _names(channels: ChannelSpec) -> tuple[str, ...]:
    return (*channels.surface, *channels.upper)


def _empty(
    channels: ChannelSpec, grid: Grid, hours: tuple[int, ...], attributes: dict[str, Any]
) -> xr.Dataset:
    """Return the store without its values."""
    coordinates: dict[str, Any] = {
        "hour": np.asarray(hours, dtype=np.int64),
        "dayofyear": np.arange(1, DAYS + 1),
        "latitude": grid.latitude.numpy(),
        "longitude": grid.longitude.numpy(),
    }
    if channels.levels:
        coordinates["level"] = np.asarray(channels.levels, dtype=np.int64)
    variables = {}
    for name in _names(channels):
        level = ("level",) if name in channels.upper else ()
        dims = ("hour", "dayofyear", *level, "latitude", "longitude")
        shape = [len(coordinates[dim]) for dim in dims]
        values = dask.array.full(shape, np.nan, dtype=np.float32, chunks=[1, 1, *shape[2:]])
        variables[name] = (dims, values, attributes_of(name))
    return xr.Dataset(variables, coordinates, attributes)
