"""The observation operator H that interpolates a state to places, pressures and times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weather.grid import Grid
from weather.observations.operators.weights import (
    Weights,
    horizontal_weights,
    linear_weights,
    pressure_weights,
)
from weather.spectral_state import WIND_PAIRS
from weather.state import ChannelSpec

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
        found = parts[0]
        for part, size in zip(parts[1:], sizes, strict=True):
            found = Weights(
                (found.indices[:, :, None] * size + part.indices[:, None]).flatten(1),
                (found.values[:, :, None] * part.values[:, None]).flatten(1),
            )
        self.weights = found

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
