"""Inverse-distance weighting of innovations or of observations."""

import math
from typing import Literal

import torch
from torch import Tensor

from weather.baselines.assimilator import check_shapes
from weather.baselines.covariance import DistanceWeights, ZonalFunction, has_equal_steps
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations

_NEAREST_KM = 1e-3  # shorter distances count as this one: an observed point keeps its value
_MATRIX_BYTES = 128 * 2**20  # of weights in float64; larger ones are applied piece by piece


class InverseDistance:
    """Spread observations over the grid with weights ``distance ** -power`` (Shepard 1968).

    Every channel is analysed from its own observations, whatever their errors. Of innovations, the
    weighted mean of ``y - x_b`` is added to the background, which itself counts as an innovation of
    zero at the distance ``background_km``. Of observations, the weighted mean of the observations
    is the analysis, and the background serves only a channel that was not observed at all.

    Args:
        grid: Grid of the fields.
        of: ``"innovations"`` or ``"observations"``.
        power: Exponent of the distance.
        background_km: Distance at which the background counts as much as one observation; infinite
            to carry innovations around the whole globe.
        members: Ensemble size M; all members are analysed alike.

    Raises:
        ValueError: An argument is out of range, or ``background_km`` is given for observations.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        of: Literal["innovations", "observations"] = "innovations",
        power: float = 2.0,
        background_km: float = math.inf,
        members: int = 1,
    ) -> None:
        if of not in ("innovations", "observations"):
            raise ValueError(f"of={of!r} is unknown, expected 'innovations' or 'observations'")
        if not (power > 0 and background_km > 0):
            raise ValueError(
                f"power and background_km must be positive, got {power} and {background_km}"
            )
        if of == "observations" and not math.isinf(background_km):
            raise ValueError("background_km has no meaning for of='observations': leave it out")
        self.of, self.members = of, members
        self._background_weight = background_km**-power
        self._grid, self._power = grid, power
        self._weights = DistanceWeights(grid, self._weight)
        self._zonal: ZonalFunction | None = None

    def _weight(self, km: Tensor) -> Tensor:
        return km.clamp(min=_NEAREST_KM) ** -self._power

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        Raises:
            ValueError: Shapes differ.
        """
        check_shapes(background, observations, math.prod(background.shape[2:]), self.members)
        analysis = background.clone()
        for timeline, states in enumerate(background.flatten(3)):
            present = observations.mask[timeline].flatten(1)
            result = self._timeline(
                states, observations.values[timeline].flatten(1).to(states), present
            )
            analysis[timeline] = result.view_as(analysis[timeline])
        return analysis

    def _timeline(self, states: Tensor, values: Tensor, present: Tensor) -> Tensor:
        """Analyse (M, C, P) with observations and mask (C, P)."""
        seen = present.any(0).nonzero().flatten()
        present = present[:, seen]
        if self.of == "observations":
            total, spread = self._sums(seen, present.to(states), values[:, seen] * present)
            return torch.where(present.any(1)[:, None], spread / total, states)
        innovation = torch.where(present, values[:, seen] - states[:, :, seen], 0.0)
        total, increment = self._sums(seen, present.to(states), innovation)
        increment = increment / (total + self._background_weight)
        return states + torch.where(present.any(1)[:, None], increment, 0.0)

    def _sums(self, seen: Tensor, *values: Tensor) -> list[Tensor]:
        """Return the sums (..., P) of values (..., R) at the points ``seen``, by distance."""
        large = 8 * len(seen) * math.prod(self._grid.shape) > _MATRIX_BYTES
        if large and has_equal_steps(self._grid):
            if self._zonal is None:
                self._zonal = ZonalFunction(self._grid, self._weight)
            return self._zonal.weighted(seen, *values)
        weights = self._weights.at(seen, values[0].dtype)
        return [value @ weights for value in values]
