"""Observations on the model grid: value and error of every cell, from reports that share one."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weather.grid import Grid
from weather.observations.operators import BackgroundFrames, ObservationOperator, Places
from weather.observations.report_table import ObservationTable
from weather.state import ChannelSpec


def cell_of(grid: Grid, latitude: Tensor, longitude: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of the cell that contains each position.

    Args:
        grid: Cells bounded by the midpoints between rows and between columns.
        latitude: Degrees, any shape.
        longitude: Degrees in any convention, same shape.

    Returns:
        Two int64 tensors of that shape.
    """
    bounds = grid.latitude_bounds()
    ascending = bool(bounds[-1] > bounds[0])
    inner = bounds[1:-1] if ascending else bounds[1:-1].flip(0)
    row = torch.searchsorted(inner.contiguous(), latitude.to(inner).contiguous())
    row = row if ascending else grid.shape[0] - 1 - row
    west = grid.longitude_bounds()[:-1]
    eastward = (longitude.to(west) - west[0]) % 360.0
    return row, torch.searchsorted((west - west[0]).contiguous(), eastward, right=True) - 1


class _Fields(NamedTuple):
    values: Tensor
    errors: Tensor


class GriddedObservations(_Fields):
    """Observed values and their error standard deviation on the model grid.

    Absence has one representation: an infinite error, with the value 0. Weights ``1 / errors**2``
    are therefore right without any mask. A value that is not finite is absent, whatever its error.

    Attributes:
        values: (..., C, H, W) in physical units, 0 where nothing was observed.
        errors: (..., C, H, W) error standard deviation in the same units, ``inf`` where absent.
    """

    __slots__ = ()

    def __new__(cls, values: Tensor, errors: Tensor) -> "GriddedObservations":
        """Take fields of one shape; what is not finite becomes absent."""
        finite = values.isfinite()
        errors = torch.where(finite, errors, torch.inf)
        return super().__new__(cls, torch.where(finite, values, 0), errors)

    @classmethod
    def from_values(cls, values: Tensor, errors: Tensor) -> "GriddedObservations":
        """Take any values and errors; a non-finite value or error counts as absent.

        Args:
            values: (..., C, H, W); NaN marks what is absent.
            errors: Broadcastable to ``values``; a (C,) tensor holds one error per channel.

        Raises:
            ValueError: If an error of a finite value is zero, negative or NaN.
        """
        errors = per_channel(errors).to(values).expand_as(values)
        present = values.isfinite()
        if (present & ~(errors > 0)).any():
            raise ValueError(
                "an observation error is zero, negative or NaN, expected a positive standard "
                "deviation; mark absent observations by a NaN value or an infinite error"
            )
        return cls(values, errors).withhold(present & errors.isfinite())

    @classmethod
    def absent(
        cls, shape: Sequence[int], *, device: torch.device | None = None
    ) -> "GriddedObservations":
        """Return observations of the given (..., C, H, W) shape that hold nothing."""
        values = torch.zeros(tuple(shape), device=device)
        return cls(values, torch.full_like(values, torch.inf))

    @classmethod
    def stack(cls, observations: Sequence["GriddedObservations"]) -> "GriddedObservations":
        """Stack along a new first dimension, for example independent timelines."""
        values, errors = zip(*observations, strict=True)
        return cls(torch.stack(values), torch.stack(errors))

    @property
    def mask(self) -> Tensor:
        """Boolean (..., C, H, W), true where a value was observed."""
        return self.errors.isfinite()

    def withhold(self, keep: Tensor) -> "GriddedObservations":
        """Keep observations where ``keep`` is true and make the others absent.

        Args:
            keep: Boolean, broadcastable to (..., C, H, W).
        """
        return GriddedObservations(
            self.values.masked_fill(~keep, 0.0), self.errors.masked_fill(~keep, torch.inf)
        )

    def to(self, target: torch.device | torch.dtype | str) -> "GriddedObservations":
        """Move to a device or convert to a floating-point type."""
        return GriddedObservations(self.values.to(target), self.errors.to(target))


def per_channel(value: Tensor) -> Tensor:
    """Return a (C,) tensor as (C, 1, 1), so that it broadcasts over fields; others unchanged."""
    return value[:, None, None] if value.ndim == 1 else value


def confidence(
    observations: GriddedObservations, reference_sd: Tensor, kind: str = "error"
) -> Tensor:
    """Return how far an observation may be believed, from 0 (absent) to 1.

    ``binary`` is availability. ``error`` is ``1 / (1 + errors**2 / reference_sd**2)``: the weight
    of the observation in a scalar optimal interpolation with background error ``reference_sd``.

    Args:
        observations: Fields (..., C, H, W).
        reference_sd: (C,) standard deviation of the background error, in the units of the values.
        kind: ``"error"`` or ``"binary"``.

    Returns:
        (..., C, H, W) with the type of the values.

    Raises:
        ValueError: For another ``kind``.
    """
    if kind == "binary":
        return observations.mask.to(observations.values.dtype)
    if kind != "error":
        raise ValueError(f"confidence {kind!r} is unknown, expected 'error' or 'binary'")
    ratio = observations.errors / per_channel(reference_sd).to(observations.errors)
    return 1.0 / (1.0 + ratio**2)


def gross_check(
    observations: GriddedObservations,
    background: Tensor,
    sigma_b: Tensor,
    factor: float = 5.0,
) -> GriddedObservations:
    """Make observations absent that the background contradicts beyond doubt.

    An observation y passes if ``|y - background| <= factor * sqrt(sigma_b**2 + errors**2)``; NaN
    never passes.

    Args:
        observations: Fields (..., C, H, W).
        background: (..., C, H, W) in the same units.
        sigma_b: Background error standard deviation, (C,) or broadcastable to the fields.
        factor: Accepted departure in standard deviations.
    """
    expected = torch.hypot(per_channel(sigma_b).to(observations.errors), observations.errors)
    return observations.withhold(
        ((observations.values - background).abs() <= factor * expected) & observations.mask
    )


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
        values = values - operator(background.states) + background.current.flatten().double()[cell]
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
    in_state = rows["variable"].isin([*channels.surface, *channels.upper]).to_numpy()
    placed = _channel_of(rows, channels, level_tolerance) >= 0
    return LeftOut(rows[~timely], rows[timely & ~in_state], rows[timely & in_state & ~placed])


def _superobs(value: Tensor, error: Tensor, cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of every cell, 0 where empty, and its variance, inf where empty."""
    weight = error**-2
    total = torch.zeros(num_cells, dtype=torch.float64).index_add_(0, cell, weight)
    summed = torch.zeros(num_cells, dtype=torch.float64).index_add_(0, cell, weight * value)
    mean = torch.where(total > 0, summed / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return mean, 1.0 / total


def _in_window(frame: pd.DataFrame, time: np.datetime64, hours: float) -> pd.DataFrame:
    half, center = pd.Timedelta(hours=hours), pd.Timestamp(time)
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


ITERATIONS = 6
SMALLEST, LARGEST = 0.02, 10.0  # of the first guess


def innovation_sd(background: Tensor, observations: GriddedObservations, first: Tensor) -> Tensor:
    """Scale a first guess of the background error standard deviations to fit the innovations.

    In units of the first guess, the innovations ``d`` of unbiased, independent errors have the
    variance ``r**2 + errors**2``. The common factor of all channels solves
    ``r**2 = sum w (d**2 - errors**2) / sum w`` with the weights of maximum likelihood,
    ``w = (r**2 + errors**2)**-2``, by a few fixed-point steps from 1.

    Args:
        background: (B,C,H,W).
        observations: Fields (B,C,H,W) in the same units.
        first: (B,C) or (C,) first guess, which is kept where nothing is observed. The factor
            stays between 0.02 and 10.

    Returns:
        (B,C), without gradient.
    """
    with torch.no_grad():
        first = first.to(background).expand(background.shape[:2])
        unit = first[..., None, None]
        innovations = torch.where(observations.mask, observations.values - background, 0)
        square = (innovations / unit).square()
        noise = (observations.errors.to(background) / unit).square()
        factor = torch.ones_like(square[:, :1, :1, :1])
        for _ in range(ITERATIONS):
            weight = (factor + noise).pow(-2)  # 0 where nothing is observed
            excess = torch.where(observations.mask, weight * (square - noise), 0)
            total = weight.sum((1, 2, 3), keepdim=True)
            fit = excess.sum((1, 2, 3), keepdim=True) / total
            factor = torch.where(total > 0, fit, factor).clamp(SMALLEST**2, LARGEST**2)
        return first * factor.sqrt().flatten(1)
