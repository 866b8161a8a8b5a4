"""Cycles of methods on the timelines of a twin world, and the errors of every analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, Forecast, diverged
from weather.experiments.twin.scenarios import OsseTask, observed
from weather.experiments.twin.world import Period, TwinWorld
from weather.metrics import Departures, rmse, withheld_points
from weather.observations.gridded import GriddedObservations
from weather.progress import Tick, no_tick
from weather.training.stream import generator

UNGUIDED = ("free_run", "persistence", "climatology")
"""See no observations, and cannot be lost."""

TIMES = TIME, TIME_RATIO = "milliseconds", "milliseconds_over_oi"
DEPARTURES = ("assimilated", "withheld")
WITH_PAST = ("nudging", "four_d_var")
"""Remember their last analyses: an extra analysis would be taken for one of the cycle."""


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
) -> dict[str, Tensor]:
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

    Returns:
        ``analysis`` (T,B,C), the RMSE of every analysis (ensemble mean) in the units of the
        channels; ``lost`` (B,), True where the cycle left the truth and was stopped; and the sums
        of the departures, see `weather.metrics.DepartureSums`.
    """
    lost = torch.zeros(truth.shape[1], dtype=torch.bool)
    analyses = []
    cycle = Cycle(forecast, assimilator, hours)
    for number, (now, step) in enumerate(zip(truth, cycle.run(first, observations), strict=True)):
        mean = step.analysis.mean(1)
        analyses.append(rmse(mean, now, area_weights))
        if guard:
            lost |= diverged(mean - now, climatological_sd)
            # A lost timeline counts as climatology; the truth keeps its arithmetic finite.
            step.analysis[lost] = now[lost].unsqueeze(1).to(step.analysis)
        if departures is not None and number >= len(truth) // 3:
            departures.add(step, assimilator, keep=~lost)
        tick()
    scores = {"analysis": torch.stack(analyses), "lost": lost}
    if departures is not None:
        for name in DEPARTURES:
            sums = getattr(departures, name)
            scores |= {} if sums is None else sums.tensors(f"{name}.")
    return scores


class Watched:
    """A method that is watched where nothing is observed.

    Args:
        method: The method.

    Attributes:
        changed: Largest change of a background that nothing was observed of.
    """

    def __init__(self, method: Assimilator) -> None:
        self.method, self.members = method, method.members
        self.changed = 0.0

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis of the method."""
        analysis = self.method.analyze(background, observations)
        silent = ~observations.mask.flatten(1).any(1)
        if bool(silent.any()):
            change = (analysis[silent] - background[silent]).abs().max()
            self.changed = max(self.changed, float(change))
        return analysis


class TwinCycles:
    """Runs methods on the timelines of a world; every method sees the same observations.

    Args:
        world: The world.
        cycles: Cycles to run, all of the world's if None.
    """

    def __init__(self, world: TwinWorld, cycles: int | None = None) -> None:
        self.world, self.cycles = world, cycles or world.cycles
        self.sd = world.climatological_sd()

    def run(
        self,
        task: OsseTask,
        name: str,
        method: Assimilator,
        period: Period = "test",
        rows: Sequence[int] | None = None,
        *,
        cycles: int | None = None,
        verify: bool = False,
        tick: Tick = no_tick,
    ) -> dict[str, Tensor]:
        """Cycle a method and return the tensors of its scores.

        Args:
            task: What is observed, and the forecast model.
            name: Of the method.
            method: The method.
            period: Whose timelines.
            rows: Numbers of the timelines, repeated if need be; all if None.
            cycles: To run, as many as the others if None.
            verify: Also compare the analyses with the observations, a tenth of them withheld.
            tick: Called after every cycle.
        """
        rows = range(len(self.world.members[period])) if rows is None else rows
        cycles = cycles or self.cycles
        watched = Watched(method)
        with torch.no_grad():
            scores = score_cycle(
                self.world.forecast(task.model),
                watched,
                first_background(self.world, period, method.members)[list(rows)],
                self.world.truth(period)[:cycles][:, list(rows)],
                (state for state, _ in zip(
                    observed(task, self.world, period, rows), range(cycles), strict=False)),
                area_weights=self.world.grid.area_weights(),
                climatological_sd=self.sd,
                hours=self.world.hours,
                guard=name not in UNGUIDED,
                departures=self._departures(period, rows) if verify and name not in WITH_PAST
                else None,
                tick=tick,
            )  # fmt: skip
        return scores | {"changed": torch.tensor(watched.changed)}

    def score(self, task: OsseTask, name: str, method: Assimilator) -> float:
        """Return what tuning minimizes: the geometric mean of errors over standard deviations.

        It is over the channels of the timelines for tuning and validation. The root of the mean
        square is decided by the one timeline that is nearly lost.

        Raises:
            ValueError: A method refuses its setting, or an analysis cannot be computed.
        """
        return self.error(self.run(task, name, method, "choice"))

    def error(self, found: dict[str, Tensor]) -> float:
        """Return the geometric mean of the settled errors over standard deviations."""
        return float((settled(found, self.sd) / self.sd).log().mean().exp())

    def _departures(self, period: Period, rows: Sequence[int]) -> Departures:
        """Withhold a tenth of the points of every timeline, in every tenth cycle."""
        members = list(self.world.members[period])
        points = [withheld_points(self.world.grid, self.world.seed, members[r], 6) for r in rows]
        return Departures(torch.stack(points), every=10)


def first_background(world: TwinWorld, period: Period, members: int) -> Tensor:
    """Return (B,M,C,H,W): the first background, plus day differences of training states.

    The perturbations of a timeline have mean zero; a single member is not perturbed.
    """
    first = world.first_background(period)
    if members == 1:
        return first
    samples = world.day_differences()
    rows = []
    for member in world.members[period]:
        draw = generator(world.seed, member, 5)
        chosen = samples[torch.randperm(len(samples), generator=draw)[:members]]
        rows.append(chosen - chosen.mean(0))
    return first + torch.stack(rows)


def settled(found: dict[str, Tensor], climatological_sd: Tensor) -> Tensor:
    """Return the analysis RMSE (B,C) after the first third of the cycles.

    A lost timeline counts as climatology: as the climatological standard deviation.

    Args:
        found: Tensors of `TwinCycles.run`.
        climatological_sd: (C,).
    """
    analysis = found["analysis"]
    error = analysis[len(analysis) // 3 :].square().mean(0).sqrt()
    return torch.where(found["lost"][:, None], climatological_sd.to(error), error)
