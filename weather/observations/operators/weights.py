"""Weights of linear interpolation between points, levels and the cells of a globe."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weather.grid import Grid
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
    found = linear_weights(levels[order].log(), pressure.log())
    upper = (channel >= surface)[:, None]
    first = surface + (channel - surface) // count * count
    return Weights(
        torch.where(upper, first[:, None] + order[found.indices], single),
        torch.where(upper, found.values, values),
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
    known = distinct.nonzero().flatten()
    vertical = linear_weights(beyond[known], latitude)
    extended = known[vertical.indices]
    across = (extended == 0) | (extended == len(rows) + 1)
    row = order[(extended - 1).clamp(0, len(rows) - 1)]
    sign = torch.where(across & wind[:, None], -1.0, 1.0)
    indices, values = [], []
    for side in range(row.shape[1]):
        turned = torch.where(across[:, side], 180.0, 0.0)
        columns = _periodic_weights(grid.longitude, longitude + turned)
        indices.append(row[:, side, None] * grid.shape[1] + columns.indices)
        weight = vertical.values[:, side] * sign[:, side]
        values.append(weight[:, None] * columns.values)
    return Weights(torch.cat(indices, 1), torch.cat(values, 1))


def _periodic_weights(longitude: Tensor, wanted: Tensor) -> Weights:
    """Return the two columns around places and their weights, around the globe."""
    around = torch.cat((longitude, longitude[:1] + 360.0))
    place = longitude[0] + (wanted - longitude[0]).remainder(360.0)
    found = linear_weights(around, place)
    return Weights(found.indices % len(longitude), found.values)
