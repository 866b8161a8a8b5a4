"""The cost of a window of observations, and what minimises it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weather.baselines.history import Model
from weather.baselines.variational.control import ControlVariable
from weather.baselines.variational.minimizer import minimize_each
from weather.observations.gridded import GriddedObservations


class Timed(NamedTuple):
    """Observations (N, C, H, W) at some hours after the start of a window."""

    hours: float
    observations: GriddedObservations


class Settings(NamedTuple):
    """How a cost is made and minimised.

    Attributes:
        scale: Factor on the background standard deviation.
        tolerance: The largest component of the gradient falls by this factor.
        max_iterations: Iterations after which a minimisation stops in any case.
    """

    scale: float
    tolerance: float
    max_iterations: int

    def check(self) -> None:
        """Refuse settings that are out of range.

        Raises:
            ValueError: The message names the setting.
        """
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")


class WindowCost:
    """``J(v) = |v|**2 / 2 + sum over times of |(y - H M(x_b + s U v)) / sigma_o|**2 / 2``.

    The control variable v of strong-constraint 4D-Var (Le Dimet and Talagrand 1986; Courtier et
    al. 1994) describes the state at the start of a window, from which the model M, without error,
    leads to the times of the observations. With all of them at the start it is 3D-Var (Lorenc
    1986). There are N independent costs; all arithmetic is float64.

    Args:
        control: The square root U of the background-error covariance.
        scale: s, factor on the background standard deviation.
        start: x_b (N, C, H, W) at the start of the window.
        observed: Observations by ascending time.
        forecast: The model; None where all times are 0.
    """

    def __init__(
        self,
        control: ControlVariable,
        scale: float,
        start: Tensor,
        observed: Sequence[Timed],
        forecast: Model | None = None,
    ) -> None:
        self.control, self.scale, self.start = control, scale, start.double()
        self.observed = [(hours, fields.to(torch.float64)) for hours, fields in observed]
        self.forecast = forecast

    def state(self, controls: Tensor, rows: Tensor) -> Tensor:
        """Return states (R, C, H, W) at the start for control vectors (R, k) of rows (R,)."""
        start = self.start[rows]
        return start + self.scale * self.control.increment(controls).view_as(start)

    def __call__(self, controls: Tensor, rows: Tensor) -> Tensor:
        """Return J (R,) for control vectors (R, k) of rows (R,)."""
        state, now = self.state(controls, rows), 0.0
        total = 0.5 * controls.square().sum(1)
        for hours, (values, errors) in self.observed:
            state, now = self.advanced(state, hours - now), hours
            departures = (values[rows] - state) / errors[rows]  # 0 where the error is infinite
            total = total + 0.5 * departures.square().flatten(1).sum(1)
        return total

    def advanced(self, state: Tensor, hours: float) -> Tensor:
        """Return states (R, C, H, W) some hours later."""
        if hours == 0 or self.forecast is None:
            return state
        return self.forecast(state, hours)

    def analyze(self, hours: float, settings: Settings) -> Tensor:
        """Return the states (N, C, H, W) at the end of a window for the minimum of every cost.

        A row is NaN if its minimisation does not lower the cost.

        Args:
            hours: Length of the window.
            settings: How to minimise.
        """
        rows = torch.arange(len(self.start))
        found = minimize_each(
            self,
            len(rows),
            self.control.num_controls,
            tolerance=settings.tolerance,
            max_iterations=settings.max_iterations,
        )
        controls = torch.stack([minimum.control for minimum in found])
        lower = torch.tensor([minimum.cost <= minimum.start_cost for minimum in found])
        with torch.no_grad():
            states = self.advanced(self.state(controls, rows), hours)
        return states.masked_fill(~lower[:, None, None, None], torch.nan)
