"""Compare methods in a twin world: who stays closest to the truth, cycle after cycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.baselines.assimilator import Assimilator
from weather.baselines.free_run import FreeRun
from weather.cycle import Forecast
from weather.experiments.departures import Departures, withheld_points
from weather.experiments.method import Method
from weather.experiments.twin.cycle_scores import CycleScores, score_cycle, settled
from weather.experiments.twin.methods import TwinMethods
from weather.experiments.twin.world import Period, TwinWorld
from weather.observations.gridded import GriddedObservations


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
        redraw: bool = False,
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
            redraw: A new network in every cycle.
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
                self._observations(task, period, rows, redraw=redraw),
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
        members = self.world.members[period]
        points = [withheld_points(self.world.grid, self.world.seed, m, 6) for m in members]
        return Departures(torch.stack(points)[rows], every=10)

    def _observations(
        self, task: TwinTask, period: Period, rows: Tensor, *, redraw: bool
    ) -> Iterator[GriddedObservations]:
        stream = self.world.observations(period, task.density, redraw=redraw)
        for _, observations in zip(range(self.cycles), stream, strict=False):
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
        error = self.error(task, scores, "tuning") / self.climatological_sd
        return float(error.mean(1).max())

    def classical(self) -> list[Method]:
        """Return the classical methods."""
        return self.methods.all()
