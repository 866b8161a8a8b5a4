"""Run methods in their cycles in a twin world and keep the errors of every analysis.

Classical methods come with the boxes in which they are tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.baselines.assimilator import (
    Assimilator,
    Climatology,
    FreeRun,
    InverseDistance,
    Persistence,
)
from weather.baselines.covariance import DenseCovariance, SampleCovariance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.cycle import Cycle, Forecast, diverged
from weather.experiments.experiment import Method, Setting
from weather.experiments.twin.world import Period, TwinWorld
from weather.metrics import Departures, DepartureSums, rmse, withheld_points
from weather.observations.gridded import GriddedObservations
from weather.training.stream import generator


class CycleScores(NamedTuple):
    """Errors of T cycles on B timelines, in the units of the C channels.

    Attributes:
        background: (T,B,C) RMSE of the background (ensemble mean).
        analysis: (T,B,C) RMSE of the analysis.
        spread: (T,B,C) ensemble standard deviation of the analysis, 0 for one member.
        lost: (B,) True where the cycle left the truth and was stopped.
        assimilated: Departures from the observations after the first third, lost timelines left
            out; None if not asked for.
        withheld: Departures from observations that an extra analysis did not see.
        timelines: (B,) number of each timeline in its period; None for all, in order.
    """

    background: Tensor
    analysis: Tensor
    spread: Tensor
    lost: Tensor
    assimilated: DepartureSums | None = None
    withheld: DepartureSums | None = None
    timelines: Tensor | None = None

    def rows(self, chosen: Tensor) -> CycleScores:
        """Return some of the timelines, with the departures of all."""
        return self._replace(
            background=self.background[:, chosen],
            analysis=self.analysis[:, chosen],
            spread=self.spread[:, chosen],
            lost=self.lost[chosen],
            timelines=chosen if self.timelines is None else self.timelines[chosen],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, to be kept."""
        found = {name: value for name, value in self._asdict().items() if name in _TENSORS}
        for prefix, sums in (("assimilated.", self.assimilated), ("withheld.", self.withheld)):
            if sums is not None:
                found |= sums.tensors(prefix)
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CycleScores:
        """Return what :meth:`tensors` gave."""
        sums = {name: DepartureSums.from_tensors(tensors, f"{name}.") for name in _SUMS}
        own = {name: value for name, value in tensors.items() if name in _TENSORS}
        return cls(**own, **sums)  # type: ignore[arg-type]


_SUMS = ("assimilated", "withheld")
_TENSORS = tuple(name for name in CycleScores._fields if name not in _SUMS)


def score_cycle(
    forecast: Forecast,
    assimilator: Assimilator,
    first: Tensor,
    truth: Tensor,
    observations: Iterable[GriddedObservations],
    *,
    area_weights: Tensor,
    climatological_sd: Tensor,
    hours: float = 6.0,
    guard: bool = True,
    departures: Departures | None = None,
    tick: Callable[[], None] = lambda: None,
) -> CycleScores:
    """Cycle a method along a truth.

    Args:
        forecast: ``(states, hours) -> states``.
        assimilator: The method.
        first: (B,M,C,H,W) first background.
        truth: (T,B,C,H,W).
        observations: T batches of observations (B,C,H,W).
        area_weights: (H,) of the grid.
        climatological_sd: (C,) beyond 1.5 of which, or when not finite, a timeline counts as lost.
        hours: Length of a cycle.
        guard: Whether timelines can be lost; a free run cannot.
        departures: Takes the departures from the observations after the first third.
        tick: Called after every cycle, for progress.
    """
    lost = torch.zeros(truth.shape[1], dtype=torch.bool)
    backgrounds, analyses, spreads = [], [], []
    cycle = Cycle(forecast, assimilator, hours)
    for number, (now, step) in enumerate(zip(truth, cycle.run(first, observations), strict=True)):
        mean = step.analysis.mean(1)
        analyses.append(rmse(mean, now, area_weights))
        backgrounds.append(rmse(step.background.mean(1), now, area_weights))
        spreads.append(_spread(step.analysis, area_weights))
        if guard:
            lost |= diverged(mean - now, climatological_sd)
            # A lost timeline is scored as the free run; the truth keeps its arithmetic finite.
            step.analysis[lost] = now[lost].unsqueeze(1).to(step.analysis)
        if departures is not None and number >= len(truth) // 3:
            departures.add(step, assimilator, keep=~lost)
        tick()
    return CycleScores(
        torch.stack(backgrounds),
        torch.stack(analyses),
        torch.stack(spreads),
        lost,
        departures.assimilated if departures else None,
        departures.withheld if departures else None,
    )


def _spread(states: Tensor, area_weights: Tensor) -> Tensor:
    if states.shape[1] == 1:
        return states.new_zeros(states.shape[0], states.shape[2])
    return (states.var(1).mean(-1) * area_weights.to(states)).mean(-1).sqrt()


def settled(scores: CycleScores, free: CycleScores | None = None) -> Tensor:
    """Return the analysis RMSE (B,C) after the first third of the cycles.

    The mean square over the cycles is taken before the root. Lost timelines get the error of the
    free run.

    Args:
        scores: The scores.
        free: Those of the free run on the same timelines.

    Raises:
        ValueError: The free run has other timelines.
    """
    return settled_squares(scores, free).mean(0).sqrt()


def settled_squares(scores: CycleScores, free: CycleScores | None = None) -> Tensor:
    """Return the square errors (T,B,C) of the analyses that :func:`settled` averages."""
    own = scores.analysis[len(scores.analysis) // 3 :].square()
    if free is None:
        return own
    other = settled_squares(free)
    if other.shape != own.shape:
        raise ValueError(
            f"{own.shape[1]} timelines, but a free run of {other.shape[1]}: give the same"
        )
    return torch.where(scores.lost[:, None], other, own)


MEMBERS = 20


class TwinMethods:
    """Build the methods of a world; the covariances of day differences are kept by their length.

    Args:
        world: The world that they work in.
    """

    def __init__(self, world: TwinWorld) -> None:
        self.world = world
        self._covariance: dict[float, DenseCovariance | SampleCovariance] = {}

    def all(self) -> list[Method]:
        """Return every classical method, the free run first."""
        grid, climatology = self.world.grid, self.world.climatology()
        return [
            Method("free_run", lambda _: FreeRun()),
            Method("persistence", lambda _: Persistence()),
            Method("climatology", lambda _: Climatology(climatology)),
            Method(
                "inverse_distance",
                lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
                {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
            ),
            Method(
                "inverse_distance_of_observations",
                lambda s: InverseDistance(grid, of="observations", power=s["power"]),
                {"power": (1.0, 6.0)},
            ),
            Method(
                "oi",
                self._optimal_interpolation,
                {"scale": (0.01, 0.4), "length_km": (1000.0, 4000.0)},
            ),
            Method(
                "letkf",
                lambda s: LETKF(
                    grid,
                    MEMBERS,
                    localization_km=s["length_km"],
                    inflation=1 + s["excess"],
                    relaxation=s["relaxation"],
                ),
                {
                    "length_km": (500.0, 4000.0),
                    "excess": (0.005, 0.5),  # of the inflation over 1
                    "relaxation": (0.1, 0.95),
                },
                members=MEMBERS,
            ),
        ]

    def _optimal_interpolation(self, setting: Setting) -> OptimalInterpolation:
        length = setting["length_km"]
        covariance = self._covariance.get(length)
        if covariance is None:
            covariance = self.world.background_covariance(length)
            self._covariance = {length: covariance}  # only one, of 150 MB at T21
        return OptimalInterpolation(covariance, scale=setting["scale"])

    def first_background(self, period: Period, members: int) -> Tensor:
        """Return (B,M,C,H,W): the first background plus day differences of the training states.

        The perturbations of a timeline have mean zero; a single member is not perturbed.
        """
        first = self.world.first_background(period)
        if members == 1:
            return first
        samples = self.world.day_differences()
        rows = []
        for member in self.world.members[period]:
            draw = generator(self.world.seed, member, 5)
            chosen = samples[torch.randperm(len(samples), generator=draw)[:members]]
            rows.append(chosen - chosen.mean(0))
        return first + torch.stack(rows)


class TwinTask(NamedTuple):
    """A density of observations and a forecast model.

    Attributes:
        density: Fraction of grid points observed.
        model: ``"perfect"`` or ``"error"``.
    """

    density: float
    model: str

    @property
    def name(self) -> str:
        """Name in settings and tables, such as ``0.01/perfect``."""
        return f"{self.density:.3g}/{self.model}"


def twin_tasks(densities: Sequence[float]) -> list[TwinTask]:
    """Return every density with the perfect model, then with the imperfect one."""
    return [TwinTask(density, model) for model in ("perfect", "error") for density in densities]


class TwinEvaluation:
    """Run methods on the timelines of a period; every method sees the same observations.

    Args:
        world: The world.
        densities: Fractions of grid points observed.
        cycles: Cycles to run, all of the world's if None.
    """

    def __init__(
        self, world: TwinWorld, densities: Sequence[float], cycles: int | None = None
    ) -> None:
        self.world, self.cycles = world, cycles or world.cycles
        self.tasks = twin_tasks(densities)
        self.methods = TwinMethods(world)
        self.area_weights = world.grid.area_weights()
        self.climatological_sd = world.climatological_sd()
        self._free: dict[tuple[str, Period], CycleScores] = {}

    def task(self, name: str) -> TwinTask:
        """Return a task by its name."""
        return next(task for task in self.tasks if task.name == name)

    def forecast(self, task: TwinTask) -> Forecast:
        """Return the forecast model of a task."""
        return self.world.model if task.model == "perfect" else self.world.imperfect

    def run(
        self,
        task: TwinTask,
        assimilator: Assimilator,
        period: Period = "test",
        *,
        guard: bool = True,
        timelines: Sequence[int] | None = None,
        verify: bool = False,
        tick: Callable[[], None] = lambda: None,
    ) -> CycleScores:
        """Cycle a method on the timelines of a period.

        Args:
            task: Density and forecast model.
            assimilator: The method.
            period: Whose timelines.
            guard: Whether timelines can be lost.
            timelines: Numbers of the timelines to run, repeated if need be; all if None.
            verify: Also compare the analyses with the observations, a tenth of them withheld.
            tick: Called after every cycle.

        Raises:
            GatesError: The period has fewer timelines.
        """
        count = len(self.world.members[period])
        rows = torch.arange(count) if timelines is None else torch.tensor(timelines)
        if int(rows.max()) >= count:
            raise GatesError(
                f"timeline {int(rows.max()) + 1} of {count} in the {period} period: take fewer "
                "seeds or a world with more"
            )
        first = self.methods.first_background(period, assimilator.members)[rows]
        with torch.no_grad():
            scores = score_cycle(
                self.forecast(task),
                assimilator,
                first,
                self.world.truth(period)[: self.cycles][:, rows],
                self._observations(task, period, rows),
                area_weights=self.area_weights,
                climatological_sd=self.climatological_sd,
                hours=self.world.hours,
                guard=guard,
                departures=self._departures(period, rows) if verify else None,
                tick=tick,
            )
        return scores._replace(timelines=rows)

    def _departures(self, period: Period, rows: Tensor) -> Departures:
        """Withhold a tenth of the points of every timeline, in every tenth cycle."""
        points = [
            withheld_points(self.world.grid, self.world.seed, m, 6)
            for m in self.world.members[period]
        ]
        return Departures(torch.stack(points)[rows], every=10)

    def _observations(
        self, task: TwinTask, period: Period, rows: Tensor
    ) -> Iterator[GriddedObservations]:
        for _, observations in zip(
            range(self.cycles),
            self.world.observations(period, task.density),
            strict=False,
        ):
            yield GriddedObservations(observations.values[rows], observations.errors[rows])

    def free_run(self, task: TwinTask, period: Period = "test") -> CycleScores:
        """Return the scores without assimilation, which lost timelines are given."""
        key = (task.model, period)
        if key not in self._free:
            self._free[key] = self.run(task, FreeRun(), period, guard=False)
        return self._free[key]

    def error(self, task: TwinTask, scores: CycleScores, period: Period = "test") -> Tensor:
        """Return the settled analysis RMSE (B,C); lost timelines count as the free run.

        Args:
            task: What was run.
            scores: Of B timelines of the period.
            period: Whose timelines.
        """
        free = self.free_run(task, period)
        return settled(scores, free if scores.timelines is None else free.rows(scores.timelines))

    def tuning_score(self, task: TwinTask, assimilator: Assimilator) -> float:
        """Return what tuning minimizes: the worst network's mean RMSE over climatological sd."""
        try:
            scores = self.run(task, assimilator, "tuning")
        except ValueError:  # an analysis that cannot be computed, such as with an indefinite matrix
            return math.inf
        return float((self.error(task, scores, "tuning") / self.climatological_sd).mean(1).max())

    def classical(self) -> list[Method]:
        """Return the classical methods."""
        return self.methods.all()
