"""Analyses that minimize a cost: 3D-Var and strong-constraint 4D-Var."""

import torch
from torch import Tensor

from weather.baselines.assimilator import AnalysisHistory, Model, check_shapes
from weather.baselines.minimizer import ControlVariable, Settings, Timed, WindowCost
from weather.observations.gridded import GriddedObservations


class ThreeDVar:
    """Minimise ``J(v) = |v|**2 / 2 + |(y - H (x_b + s U v)) / sigma_o|**2 / 2`` (Lorenc 1986).

    With ``B = U U'`` the minimiser is the analysis of optimal interpolation. Every timeline and
    member has its own minimisation, by L-BFGS with gradients of autograd.

    Args:
        control: The square root U of the background-error covariance.
        scale: s, factor on the background standard deviation.
        members: Ensemble size M; each member is analyzed with the same observations.
        tolerance: The largest component of the gradient falls by this factor.
        max_iterations: Iterations after which a minimisation stops in any case.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        control: ControlVariable,
        *,
        scale: float = 1.0,
        members: int = 1,
        tolerance: float = 1e-8,
        max_iterations: int = 500,
    ) -> None:
        self.settings = Settings(scale, tolerance, max_iterations)
        self.settings.check()
        self.control, self.members = control, members

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        A state that is no longer finite is returned as it is.

        Raises:
            ValueError: Shapes differ.
        """
        check_shapes(background, observations, self.control.size, self.members)
        analysis = background.clone()
        where = to_analyze(background, observations)
        if len(where[0]):
            fields = GriddedObservations(*(part[where[0]] for part in observations))
            cost = WindowCost(
                self.control, self.settings.scale, background[where], [Timed(0.0, fields)]
            )
            analysis[where] = finite_or(background[where], cost.analyze(0.0, self.settings))
        return analysis


def to_analyze(background: Tensor, observations: GriddedObservations) -> tuple[Tensor, ...]:
    """Return timeline and member of every finite state with an observation."""
    finite = background.flatten(2).isfinite().all(2)
    return (finite & observations.mask.flatten(1).any(1)[:, None]).nonzero(as_tuple=True)


def finite_or(states: Tensor, found: Tensor) -> Tensor:
    """Return what was found (N, C, H, W), in the type of the states, which stay where it is not."""
    found = found.to(states)
    return torch.where(found.flatten(1).isfinite().all(1)[:, None, None, None], found, states)


class FourDVar:
    """Fit a trajectory of the model to the observations of a window that ends at the analysis.

    The control variable describes the state at the start of the window, whose background is the
    analysis of that time; the analysis is the end of the fitted trajectory. Observations later
    than the start count, so that no analysis uses an observation twice, and none of the future, as
    in the other methods. Through the model the static B becomes flow-dependent: for a linear model
    A and one time of observations, the analysis is that of optimal interpolation with ``A B A'``.
    With a window of zero hours it is `ThreeDVar`; a timeline whose background is not the forecast
    of the last analysis, such as the first one, uses the hours for which it is.

    The method remembers its last analyses: use one object per cycle. The cost is minimised with
    the full model (Courtier et al. 1994 minimise linearised ones) and gradients of autograd. A
    timeline that observes nothing at the time of the analysis keeps its background.

    Args:
        control: The square root U of the background-error covariance at the start of a window.
        forecast: The model of the cycle, differentiable.
        window_hours: Length of the window, a multiple of ``hours``.
        hours: Length of a cycle.
        scale: Factor on the background standard deviation.
        members: Ensemble size M; each member is analyzed with the same observations.
        tolerance: The largest component of the gradient falls by this factor.
        max_iterations: Iterations after which a minimisation stops in any case.

    Attributes:
        history: The last analyses; a cycle that continues after a stop fills it again.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        control: ControlVariable,
        forecast: Model,
        *,
        window_hours: float = 6.0,
        hours: float = 6.0,
        scale: float = 1.0,
        members: int = 1,
        tolerance: float = 1e-3,
        max_iterations: int = 100,
    ) -> None:
        self.settings = Settings(scale, tolerance, max_iterations)
        self.settings.check()
        cycles = round(window_hours / hours) if hours > 0 else -1
        if cycles < 0 or abs(cycles * hours - window_hours) > 1e-9:
            raise ValueError(
                f"window_hours must be a multiple of a cycle of {hours:g} h, got {window_hours:g}"
            )
        self.control, self.forecast = control, forecast
        self.hours, self.members = hours, members
        self.history = AnalysisHistory(forecast, hours, cycles)

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        A state that is no longer finite is returned as it is.

        Raises:
            ValueError: Shapes differ.
        """
        check_shapes(background, observations, self.control.size, self.members)
        ages, analysis = self.history.ages(background), background.clone()
        rows, members = to_analyze(background, observations)
        for age in ages[rows].unique().tolist():
            here = ages[rows] == age
            where = (rows[here], members[here])
            start = self.history.back(age).analysis if age else background
            cost = WindowCost(
                self.control,
                self.settings.scale,
                start[where],
                self._observed(where[0], age, observations),
                self.forecast,
            )
            analysis[where] = finite_or(
                background[where], cost.analyze(age * self.hours, self.settings)
            )
        self.history.remember(analysis, observations, ages)
        return analysis

    def _observed(self, rows: Tensor, age: int, observations: GriddedObservations) -> list[Timed]:
        """Return the observations of some timelines after the start of a window of some cycles."""
        past = [self.history.back(cycles).observations for cycles in range(age - 1, 0, -1)]
        return [
            Timed(
                (age - len(past) + number) * self.hours,
                GriddedObservations(*(part[rows] for part in fields)),
            )
            for number, fields in enumerate([*past, observations])
        ]
