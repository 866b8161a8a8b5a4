"""Simulated stations anywhere on the globe, which observe a spectral truth."""

from __future__ import annotations

import torch
from torch import Tensor

from weather.observations.gridded import GriddedObservations
from weather.observations.operators.interpolation import (
    BackgroundFrames,
    ObservationOperator,
    Places,
)
from weather.observations.operators.weights import linear_weights
from weather.observations.superob import grid_reports
from weather.spectral_state import FieldLayout, PointEvaluation, to_coefficients
from weather.spherical import SphericalTransform
from weather.state import ChannelSpec


class Stations:
    """Fixed stations off the grid, which report all channels once per analysis.

    What they observe is the sum of the spherical harmonics of the truth at their place, so that
    neither the nearest cell nor an operator that interpolates is right by construction. A station
    reports at its own time around the analysis; the truth of that time is interpolated linearly
    between frames, which should be dense.

    Args:
        transform: The spherical transform, on the grid of the states.
        channels: The C channels.
        count: Stations, drawn uniformly on the sphere.
        error_sd: (C,) standard deviations of the errors.
        seed: Determines places and times.
        spread_hours: Reports lie within this time of the analysis.
    """

    def __init__(
        self,
        transform: SphericalTransform,
        channels: ChannelSpec,
        count: int,
        error_sd: Tensor,
        *,
        seed: int,
        spread_hours: float = 0.0,
    ) -> None:
        self.transform, self.channels = transform, channels
        draw = torch.rand(
            3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        latitude, longitude = (2 * draw[0] - 1).asin().rad2deg(), 360 * draw[1]
        num_channels = channels.num_channels
        levels = [torch.nan if level is None else float(level) for _, level in channels]
        self.hours = (2 * draw[2] - 1) * spread_hours
        self.places = Places(
            latitude.repeat(num_channels),
            longitude.repeat(num_channels),
            torch.arange(num_channels).repeat_interleave(count),
            torch.tensor(levels, dtype=torch.float64).repeat_interleave(count),
            self.hours.repeat(num_channels),
        )
        self.errors = error_sd.double().repeat_interleave(count)
        self._layout = FieldLayout.of(channels)
        self._evaluation = PointEvaluation(transform, latitude, longitude)
        self._operators: dict[tuple[float, ...], ObservationOperator] = {}

    def observe(self, truth: BackgroundFrames, generator: torch.Generator | None = None) -> Tensor:
        """Return the reports (C p,), float64, of a truth; errors take a generator."""
        coefficients = to_coefficients(truth.states, self.transform, self._layout)
        values = self._evaluation(coefficients, self._layout)  # (F, C, p)
        hours = torch.tensor(truth.hours, dtype=torch.float64)
        when = linear_weights(hours, self.hours.clamp(hours[0], hours[-1]))
        near = values.permute(2, 0, 1).gather(
            1, when.indices[:, :, None].expand(-1, -1, values.shape[1])
        )
        values = (near * when.values[:, :, None]).sum(1).T.flatten()
        if generator is None:
            return values
        noise = torch.randn(len(values), generator=generator, dtype=torch.float64)
        return values + self.errors * noise

    def gridded(
        self,
        values: Tensor,
        background: BackgroundFrames | None = None,
        *,
        representativeness_sd: Tensor | None = None,
    ) -> GriddedObservations:
        """Return reports (C p,) as cells (C, H, W), see `weather.observations.superob`.

        Args:
            values: The reports.
            background: Frames that the observation operator interpolates; None for the nearest
                cell.
            representativeness_sd: (C,) standard deviation that is added to the errors of cells.
        """
        operator = None
        if background is not None:
            operator = self._operators.get(background.hours)
            if operator is None:
                operator = ObservationOperator(
                    self.transform.grid, self.channels, self.places, background.hours
                )
                self._operators[background.hours] = operator
        return grid_reports(
            self.transform.grid,
            self.channels,
            self.places,
            values,
            self.errors,
            background=background,
            operator=operator,
            representativeness_sd=representativeness_sd,
        )
