"""Newtonian relaxation towards observations."""

import math

import torch
from torch import Tensor

from weather.baselines.assimilator import AnalysisHistory, Model, check_shapes
from weather.baselines.covariance import DistanceWeights, GaspariCohnTaper
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations


class Nudging:
    """Pull the model towards the observations while it runs (Hoke and Anthes 1976).

    The cycle before an analysis is integrated again, from the last analysis, in ``steps`` parts.
    After part k of n the state relaxes for its hours, ``x += (1 - exp(-r hours / relaxation_hours))
    W (y - H x)`` with r = k / n: observations count more the closer in time they are. W spreads the
    departures of a channel by ``sum w**2 p d / sum w p`` with the taper w of Gaspari and Cohn and
    the precision p (Stauffer and Seaman 1990). A timeline whose background is not the forecast of
    the last analysis, such as the first one, is relaxed once, by the last step.

    The method remembers its last analyses: use one object per cycle. A timeline that observes
    nothing keeps its background.

    Args:
        grid: Grid of the fields.
        forecast: The model of the cycle.
        relaxation_hours: Time scale of the relaxation.
        radius_km: Half width c of the taper, which vanishes from 2c on.
        hours: Length of a cycle.
        steps: Parts n of a cycle; the model must be able to forecast ``hours / steps``.
        members: Ensemble size M; each member is nudged towards the same observations.

    Attributes:
        history: The last analyses; a cycle that continues after a stop fills it again.

    Raises:
        ValueError: A setting is not positive.
    """

    def __init__(
        self,
        grid: Grid,
        forecast: Model,
        *,
        relaxation_hours: float = 6.0,
        radius_km: float = 1500.0,
        hours: float = 6.0,
        steps: int = 2,
        members: int = 1,
    ) -> None:
        for name, value in (
            ("relaxation_hours", relaxation_hours),
            ("radius_km", radius_km),
            ("hours", hours),
            ("steps", steps),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.forecast, self.relaxation_hours = forecast, relaxation_hours
        self.hours, self.steps, self.members = hours, steps, members
        self._taper = DistanceWeights(grid, GaspariCohnTaper(radius_km))
        self.history = AnalysisHistory(forecast, hours, 1)

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        A state that is no longer finite, or would become so, is returned as it is.

        Raises:
            ValueError: Shapes differ.
        """
        check_shapes(background, observations, math.prod(background.shape[2:]), self.members)
        ages = self.history.ages(background)
        seen = observations.mask.flatten(1).any(1)
        analysis = background.clone()
        for continued in (True, False):
            rows = seen & ((ages > 0) == continued)
            if bool(rows.any()):
                start = self.history.back(1).analysis if continued else background
                fields = GriddedObservations(*(part[rows] for part in observations))
                analysis[rows] = self._nudged(start[rows], fields, continued=continued)
        found = analysis.flatten(2).isfinite().all(2)[:, :, None, None, None]
        analysis = torch.where(found, analysis, background)
        self.history.remember(analysis, observations, ages)
        return analysis

    def _nudged(
        self, states: Tensor, observations: GriddedObservations, *, continued: bool
    ) -> Tensor:
        """Relax states (B, M, C, H, W) over the last cycle, or only once at its end."""
        part = self.hours / self.steps
        for number in range(1 if continued else self.steps, self.steps + 1):
            if continued:
                with torch.no_grad():
                    states = self.forecast(states.flatten(0, 1), part).view_as(states)
            rate = number / self.steps * part / self.relaxation_hours
            states = states - math.expm1(-rate) * self._spread(states, observations)
        return states

    def _spread(self, states: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the departures spread over the grid, (B, M, C, H, W)."""
        increments = torch.zeros_like(states)
        for line, state in enumerate(states.flatten(3)):
            errors = observations.errors[line].flatten(1).to(states)
            present = errors.isfinite().any(0).nonzero().flatten()
            precision = errors[:, present].square().reciprocal()  # (C, U), 0 where absent
            taper = self._taper.at(present, states.dtype)
            values = observations.values[line].flatten(1)[:, present].to(states)
            total = precision @ taper  # (C, P)
            spread = (precision * (values - state[:, :, present])) @ taper.square()
            spread = torch.where(total > 0, spread / total, 0.0)
            increments[line] = spread.view_as(increments[line])
        return increments
