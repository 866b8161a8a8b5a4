"""Observation operators: a state interpolated linearly to places, pressures and times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weather.grid import Grid
from weather.spherical import WIND_PAIRS
from weather.state import ChannelSpec


class Weights(NamedTuple):
    """Which elements of a vector make up each of p values, and with what weight.

    Attributes:
        indices: (p, k) int64.
        values: (p, k) float64.
    """

    indices: Tensor
    values: Tensor


def linear_weights(points: Tensor, wanted: Tensor) -> Weights:
    """Return the two weights of linear interpolation, or extrapolation, between ascending points.

    Args:
        points: (q,) ascending.
        wanted: (p,).

    Returns:
        (p, 2), or (p, 1) of a single point.
    """
    if len(points) == 1:
        zero = torch.zeros(len(wanted), 1, dtype=torch.long)
        return Weights(zero, torch.ones_like(zero, dtype=torch.float64))
    upper = torch.searchsorted(points, wanted.contiguous()).clamp(1, len(points) - 1)
    fraction = (wanted - points[upper - 1]) / (points[upper] - points[upper - 1])
    return Weights(torch.stack((upper - 1, upper), 1), torch.stack((1 - fraction, fraction), 1))


def pressure_weights(channels: ChannelSpec, channel: Tensor, pressure: Tensor) -> Weights:
    """Return the channels (p, 2) that make up a variable at a pressure, and their weights.

    Args:
        channels: The channels.
        channel: (p,) a channel of the variable.
        pressure: (p,) hPa; not used of surface variables.
    """
    count, surface = len(channels.levels), len(channels.surface)
    single = torch.stack((channel, channel), 1)
    values = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(channel), 2)
    if count < 2:
        return Weights(single, values)
    levels = torch.tensor(channels.levels, dtype=torch.float64)
    order = levels.argsort()
    nearest = linear_weights(levels[order].log(), pressure.log())
    upper = (channel >= surface)[:, None]
    first = surface + (channel - surface) // count * count
    return Weights(
        torch.where(upper, first[:, None] + order[nearest.indices], single),
        torch.where(upper, nearest.values, values),
    )


def horizontal_weights(grid: Grid, latitude: Tensor, longitude: Tensor, wind: Tensor) -> Weights:
    """Return the four points (p, 4), counted row by row, around places, and bilinear weights.

    Args:
        grid: The grid.
        latitude: (p,) degrees.
        longitude: (p,) degrees in any convention.
        wind: (p,) boolean, whether the value changes sign across a pole.
    """
    order = grid.latitude.argsort()
    rows = grid.latitude[order]
    beyond = torch.cat((-180 - rows[:1], rows, 180 - rows[-1:]))
    distinct = torch.ones(len(beyond), dtype=torch.bool)  # a row on a pole has none across it
    distinct[0], distinct[-1] = rows[0] > -90, rows[-1] < 90
    nodes = distinct.nonzero().flatten()
    vertical = linear_weights(beyond[nodes], latitude)
    extended = nodes[vertical.indices]
    across = (extended == 0) | (extended == len(rows) + 1)
    row = order[(extended - 1).clamp(0, len(rows) - 1)]
    sign = torch.where(across & wind[:, None], -1.0, 1.0)
    indices, values = [], []
    for side in range(row.shape[1]):
        columns = _periodic_weights(
            grid.longitude, longitude + torch.where(across[:, side], 180.0, 0.0)
        )
        indices.append(row[:, side, None] * grid.shape[1] + columns.indices)
        values.append((vertical.values[:, side] * sign[:, side])[:, None] * columns.values)
    return Weights(torch.cat(indices, 1), torch.cat(values, 1))


def _periodic_weights(longitude: Tensor, wanted: Tensor) -> Weights:
    """Return the two columns around places and their weights, around the globe."""
    around = torch.cat((longitude, longitude[:1] + 360.0))
    found = linear_weights(around, longitude[0] + (wanted - longitude[0]).remainder(360.0))
    return Weights(found.indices % len(longitude), found.values)


WINDS = frozenset(name for pair in WIND_PAIRS for name in pair)
"""Components along the meridian and the parallel, which change sign across a pole."""


class BackgroundFrames(NamedTuple):
    """A background at one or more times around that of the analysis.

    Attributes:
        states: (F, C, H, W) in physical units.
        hours: F times after that of the analysis, ascending; one of them is 0.
    """

    states: Tensor
    hours: tuple[float, ...]

    @classmethod
    def single(cls, state: Tensor) -> BackgroundFrames:
        """Take one state (C, H, W) for all times."""
        return cls(state[None], (0.0,))

    @property
    def current(self) -> Tensor:
        """The state (C, H, W) at the time of the analysis.

        Raises:
            ValueError: No frame is of that time.
        """
        if 0.0 not in self.hours:
            raise ValueError(
                f"no frame is at the time of the analysis, found {list(self.hours)} hours after it"
            )
        return self.states[self.hours.index(0.0)]


class Places(NamedTuple):
    """Where and when p reports were made, float64 and int64 (p,).

    Attributes:
        latitude: Degrees.
        longitude: Degrees, in any convention.
        channel: Channel that is observed; of an upper variable, any of its levels.
        pressure: hPa, NaN of a surface variable.
        hours: Time after that of the analysis.
    """

    latitude: Tensor
    longitude: Tensor
    channel: Tensor
    pressure: Tensor
    hours: Tensor


class ObservationOperator:
    """H as a sparse linear map from F frames of a state to p values.

    H is bilinear in latitude and longitude, around the globe in longitude, linear in ln(pressure)
    and linear in time between frames (first guess at appropriate time, FGAT). Beyond the outermost
    row a place lies between that row and the same row across the pole, half a turn away, where
    components of the wind have the other sign. Beyond the outermost level the last two are
    extrapolated. Before the first and after the last frame, that frame holds.

    Args:
        grid: Grid of the states.
        channels: The C channels.
        places: The reports.
        frame_hours: Times (F,) of the frames after that of the analysis, ascending.

    Raises:
        ValueError: There is no frame, or their times do not ascend.
    """

    def __init__(
        self,
        grid: Grid,
        channels: ChannelSpec,
        places: Places,
        frame_hours: Sequence[float] = (0.0,),
    ) -> None:
        hours = torch.tensor(list(frame_hours), dtype=torch.float64)
        if not len(hours) or not (hours.diff() > 0).all():
            raise ValueError(f"frame_hours must ascend, found {list(frame_hours)}")
        self.shape = (len(hours), channels.num_channels, *grid.shape)
        wind = torch.tensor([name in WINDS for name, _ in channels])[places.channel]
        parts = (
            linear_weights(hours, places.hours.clamp(hours[0], hours[-1])),
            pressure_weights(channels, places.channel, places.pressure),
            horizontal_weights(grid, places.latitude, places.longitude, wind),
        )
        sizes = (channels.num_channels, grid.shape[0] * grid.shape[1])
        product = parts[0]
        for part, size in zip(parts[1:], sizes, strict=True):
            product = Weights(
                (product.indices[:, :, None] * size + part.indices[:, None]).flatten(1),
                (product.values[:, :, None] * part.values[:, None]).flatten(1),
            )
        self.weights = product

    def __call__(self, frames: Tensor) -> Tensor:
        """Return the values (..., p), float64, of frames (..., F, C, H, W), differentiable.

        Raises:
            ValueError: The frames have another shape.
        """
        if tuple(frames.shape[-4:]) != self.shape:
            raise ValueError(
                f"expected frames (..., F, C, H, W) with {self.shape}, found {tuple(frames.shape)}"
            )
        near = frames.flatten(-4)[..., self.weights.indices].double()
        return torch.where(self.weights.values == 0, 0.0, near * self.weights.values).sum(-1)
