"""Gridding a table of observations: reports that share a cell become one superobservation."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weather.grid import Grid
from weather.observations.cells import cell_of
from weather.observations.gridded import GriddedObservations, per_channel
from weather.observations.operators.interpolation import (
    BackgroundFrames,
    ObservationOperator,
    Places,
)
from weather.observations.table import ObservationTable
from weather.state import ChannelSpec

LEVEL_TOLERANCE = 0.02  # of the pressure: 10 hPa at 500 hPa


class LeftOut(NamedTuple):
    """Rows of a table that no analysis uses, each in the first part that fits.

    Attributes:
        time: Outside the window of every analysis.
        variable: Of a variable that is none of the channels.
        level: Of a level that is none of the channels.
    """

    time: pd.DataFrame
    variable: pd.DataFrame
    level: pd.DataFrame


def grid_table(
    table: ObservationTable,
    grid: Grid,
    channels: ChannelSpec,
    time: np.datetime64,
    *,
    window_hours: float = 3.0,
    representativeness_sd: Tensor | None = None,
    level_tolerance: float = LEVEL_TOLERANCE,
    background: BackgroundFrames | None = None,
) -> GriddedObservations:
    """Average the reports of a time window in every cell and channel, see `grid_reports`.

    Args:
        table: Rows with a quality flag other than 0, of other variables, or away from the levels
            are left out.
        grid: Target cells.
        channels: Target variables and levels; surface variables take rows at any level.
        time: Center of the window, UTC.
        window_hours: Half width; a report exactly at the end belongs to the next window.
        representativeness_sd: (C,) standard deviation within a cell, 0 if not given.
        level_tolerance: Accepted distance to the nearest level, as a fraction of its pressure.
        background: Frames of a background that the observation operator interpolates to place,
            pressure and time of each report; None compares reports with the nearest cell and level
            at the time of the analysis.

    Returns:
        float32 (C, H, W), all absent if no report qualifies.
    """
    rows = _in_window(table.frame, time, window_hours)
    channel = _channel_of(rows, channels, level_tolerance)
    rows, channel = rows[channel >= 0], channel[channel >= 0]
    latitude, longitude, pressure, values, errors = (
        torch.from_numpy(rows[name].to_numpy(copy=True))
        for name in ("latitude", "longitude", "level_hpa", "value", "error")
    )
    hours = (rows["time"] - pd.Timestamp(time)).dt.total_seconds().to_numpy(copy=True) / 3600
    places = Places(
        latitude, longitude, torch.from_numpy(channel), pressure, torch.from_numpy(hours)
    )
    return grid_reports(
        grid,
        channels,
        places,
        values,
        errors,
        background=background,
        representativeness_sd=representativeness_sd,
    )


def grid_reports(
    grid: Grid,
    channels: ChannelSpec,
    places: Places,
    values: Tensor,
    errors: Tensor,
    *,
    background: BackgroundFrames | None = None,
    operator: ObservationOperator | None = None,
    representativeness_sd: Tensor | None = None,
) -> GriddedObservations:
    """Average reports in every cell and channel.

    With weights w = 1 / error**2, the value of a cell is ``sum(w y) / sum(w)`` and its error
    variance ``1 / sum(w) + representativeness_sd**2``: that of n equal, independent reports is
    ``error**2 / n``, while what a cell cannot resolve does not average out. With a background, the
    value is instead ``x_b(cell) + sum(w (y - H x_b)) / sum(w)``: every method that compares cells
    with that background sees the innovations of an H that interpolates.

    Args:
        grid: Target cells.
        channels: The C channels.
        places: Where and when the p reports were made.
        values: (p,) in the units of the channels.
        errors: (p,) standard deviations.
        background: The background; None for the values themselves.
        operator: H of these places and frames, where it is known already.
        representativeness_sd: (C,) standard deviation within a cell, 0 if not given.

    Returns:
        float32 (C, H, W).
    """
    row, column = cell_of(grid, places.latitude, places.longitude)
    num_rows, num_columns = grid.shape
    cell = (places.channel * num_rows + row) * num_columns + column
    shape = (channels.num_channels, num_rows, num_columns)
    values = values.double()
    if background is not None:
        if operator is None:
            operator = ObservationOperator(grid, channels, places, background.hours)
        current = background.current.flatten().double()
        values = values - operator(background.states) + current[cell]
    mean, variance = _superobs(values, errors.double(), cell, int(np.prod(shape)))
    variance = variance.view(shape)
    if representativeness_sd is not None:
        variance = variance + per_channel(representativeness_sd.double()) ** 2
    return GriddedObservations(mean.view(shape).float(), variance.sqrt().float())


def left_out(
    table: ObservationTable,
    channels: ChannelSpec,
    times: Iterable[np.datetime64],
    *,
    window_hours: float = 3.0,
    level_tolerance: float = LEVEL_TOLERANCE,
) -> LeftOut:
    """Return the good reports that `grid_table` takes at none of ``times``, and why not."""
    rows = table.frame[table.frame["qc"] == 0]
    timely = np.zeros(len(rows), dtype=bool)
    for time in times:
        timely |= rows.index.isin(_in_window(rows, time, window_hours).index)
    known = rows["variable"].isin([*channels.surface, *channels.upper]).to_numpy()
    placed = _channel_of(rows, channels, level_tolerance) >= 0
    return LeftOut(rows[~timely], rows[timely & ~known], rows[timely & known & ~placed])


def _superobs(value: Tensor, error: Tensor, cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of every cell, 0 where empty, and its variance, inf where empty."""
    weight = error**-2
    total = torch.zeros(num_cells, dtype=torch.float64).index_add_(0, cell, weight)
    summed = torch.zeros(num_cells, dtype=torch.float64).index_add_(0, cell, weight * value)
    mean = torch.where(total > 0, summed / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return mean, 1.0 / total


def _in_window(frame: pd.DataFrame, time: np.datetime64, hours: float) -> pd.DataFrame:
    half = pd.Timedelta(hours=hours)
    center = pd.Timestamp(time)
    inside = (frame["time"] >= center - half) & (frame["time"] < center + half)
    return frame[inside & (frame["qc"] == 0)]


def _channel_of(rows: pd.DataFrame, channels: ChannelSpec, tolerance: float) -> np.ndarray:
    """Return the channel of every row, -1 if it has none."""
    variable, pressure = rows["variable"].to_numpy(), rows["level_hpa"].to_numpy()
    channel = np.full(len(rows), -1)
    for name in channels.surface:
        channel[variable == name] = channels.index(name)
    if channels.upper:
        levels = np.array(channels.levels, dtype=np.float64)
        distance = np.abs(np.log(pressure[:, None] / levels))
        nearest = np.where(np.isnan(distance), np.inf, distance).argmin(axis=1)
        close = np.abs(pressure - levels[nearest]) <= tolerance * levels[nearest]
        for name in channels.upper:
            first = channels.index(name, channels.levels[0])
            matches = (variable == name) & close
            channel[matches] = first + nearest[matches]
    return channel
