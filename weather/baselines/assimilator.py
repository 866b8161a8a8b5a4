"""What a cycle expects of an assimilation method, the simplest ones, and several in one cycle."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from weather.baselines.covariance import (
    DistanceWeights,
    GaspariCohnTaper,
    ZonalFunction,
    has_equal_steps,
)
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations


class Assimilator(Protocol):
    """Combine backgrounds with observations; learned and classical methods look the same.

    B timelines are independent of each other and may have different networks. M is the number of
    ensemble members, 1 for a deterministic method.

    The result never shares memory with the background. The classical methods return the background
    of a timeline without observations exactly, except those that ignore backgrounds altogether; a
    learned method need not.

    Attributes:
        members: M, the ensemble size that ``analyze`` expects.
    """

    members: int

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis.

        Args:
            background: (B, M, C, H, W) in physical units.
            observations: Fields (B, C, H, W) in the same units.

        Returns:
            (B, M, C, H, W) with the type of the background.
        """
        ...


def check_shapes(
    background: Tensor, observations: GriddedObservations, size: int, members: int
) -> None:
    """Refuse a background or observations of the wrong shape.

    Args:
        background: Expected (B, M, C, H, W).
        observations: Expected fields (B, C, H, W).
        size: Expected C H W.
        members: Expected M.

    Raises:
        ValueError: A shape differs.
    """
    shape = tuple(background.shape)
    if len(shape) != 5 or shape[1] != members or math.prod(shape[2:]) != size:
        raise ValueError(
            f"expected a background (B, {members}, C, H, W) with C*H*W = {size}, found {shape}"
        )
    if tuple(observations.values.shape) != (shape[0], *shape[2:]):
        raise ValueError(
            f"expected observations {(shape[0], *shape[2:])} for the background {shape}, found "
            f"{tuple(observations.values.shape)}"
        )


class Climatology:
    """Take the climatological mean for the analysis, whatever was forecast or observed.

    Args:
        mean: (C, H, W) in physical units.
    """

    members = 1

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return the mean for every timeline (B, 1, C, H, W)."""
        return self.mean.to(background).expand_as(background).clone()


class Persistence:
    """Take the first background, from which the timelines started, for every analysis."""

    members = 1

    def __init__(self) -> None:
        self.initial: Tensor | None = None

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return the background (B, 1, C, H, W) of the first call."""
        if self.initial is None:
            self.initial = background.clone()
        return self.initial.to(background).clone()


class FreeRun:
    """Ignore all observations.

    Args:
        members: Ensemble size M.
    """

    def __init__(self, members: int = 1) -> None:
        self.members = members

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:  # noqa: ARG002
        """Return a copy of the background (B, M, C, H, W)."""
        return background.clone()


class SideBySide:
    """Analyze equal parts of the timelines with one method each, so that they share the forecast.

    Args:
        methods: N methods with the same number of members; the first takes the first Nth of the
            timelines, and so on.

    Raises:
        ValueError: There is none, or their members differ.
    """

    def __init__(self, methods: Sequence[Assimilator]) -> None:
        members = {method.members for method in methods}
        if len(members) != 1:
            raise ValueError(
                f"expected methods of one ensemble size, found {sorted(members) or 'no method'}"
            )
        self.methods, self.members = list(methods), members.pop()

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B, M, C, H, W).

        Raises:
            ValueError: B is no multiple of the number of methods.
        """
        count = len(self.methods)
        if len(background) % count:
            raise ValueError(
                f"{len(background)} timelines cannot be split evenly among {count} methods"
            )
        parts = zip(
            self.methods,
            background.chunk(count),
            observations.values.chunk(count),
            observations.errors.chunk(count),
            strict=True,
        )
        return torch.cat([m.analyze(x, GriddedObservations(y, e)) for m, x, y, e in parts])


Model = Callable[[Tensor, float], Tensor]
"""States (N, C, H, W) and hours to the states at the end of that time."""

SAME = 1e-4
"""Largest difference of a background from the forecast of the last analysis, of the largest value
of a channel: beyond it, the background is another one. Rounding is a hundred times smaller."""


class Past(NamedTuple):
    """An analysis (B, M, C, H, W) and the observations (B, C, H, W) that it has used."""

    analysis: Tensor
    observations: GriddedObservations


class AnalysisHistory:
    """The last analyses of every timeline of a cycle, for as long as backgrounds follow from them.

    An `Assimilator` is given the background at the time of the observations, not what it comes
    from. A method that works in a window before that time keeps its last analyses here, and looks
    up for how many cycles each timeline has continued from them without a break: the first
    background of a run, and one that a caller has replaced, are not the forecast of the last
    analysis, which is thus not used.

    Args:
        forecast: The model that the cycle forecasts with.
        hours: Length of a cycle.
        length: Cycles that are kept.
    """

    def __init__(self, forecast: Model, hours: float, length: int) -> None:
        self.forecast, self.hours = forecast, hours
        self._past: deque[Past] = deque(maxlen=max(length, 1))
        self._ages = torch.zeros(0, dtype=torch.long)
        self.length = length

    def ages(self, background: Tensor) -> Tensor:
        """Return (B,) cycles of uninterrupted history of each background, at most the length.

        Args:
            background: (B, M, C, H, W), the forecast from the last analysis where it continues.
        """
        nothing = torch.zeros(len(background), dtype=torch.long)
        if not self.length or not self._past or self._past[-1].analysis.shape != background.shape:
            return nothing
        with torch.no_grad():
            last = self._past[-1].analysis
            expected = self.forecast(last.flatten(0, 1), self.hours).view_as(background)
        size = expected.abs().amax((1, 3, 4))
        apart = (background - expected).abs().amax((1, 3, 4))
        same = (apart <= SAME * size).all(1)  # NaN is never the same
        return torch.where(same, (self._ages + 1).clamp(max=self.length), nothing)

    def back(self, cycles: int) -> Past:
        """Return what was analyzed some cycles before the current time, at least 1."""
        return self._past[-cycles]

    def remember(self, analysis: Tensor, observations: GriddedObservations, ages: Tensor) -> None:
        """Keep an analysis, with the ages of its background."""
        self._past.append(Past(analysis.detach().clone(), observations))
        self._ages = ages


_NEAREST_KM = 1e-3  # shorter distances count as this one: an observed point keeps its value
_MATRIX_BYTES = 128 * 2**20  # of weights in float64; larger ones are applied piece by piece


class InverseDistance:
    """Spread observations over the grid with weights ``distance ** -power`` (Shepard 1968).

    Every channel is analyzed from its own observations, whatever their errors. Of innovations, the
    weighted mean of ``y - x_b`` is added to the background, which itself counts as an innovation of
    zero at the distance ``background_km``. Of observations, the weighted mean of the observations
    is the analysis, and the background serves only a channel that was not observed at all.

    Args:
        grid: Grid of the fields.
        of: ``"innovations"`` or ``"observations"``.
        power: Exponent of the distance.
        background_km: Distance at which the background counts as much as one observation; infinite
            to carry innovations around the whole globe.
        members: Ensemble size M; all members are analyzed alike.

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

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
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
        """Analyze (M, C, P) with observations and mask (C, P)."""
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

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
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
        finite = analysis.flatten(2).isfinite().all(2)[:, :, None, None, None]
        analysis = torch.where(finite, analysis, background)
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
