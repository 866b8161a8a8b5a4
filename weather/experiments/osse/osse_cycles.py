"""Cycles of a method on the timelines of a world, and one analysis of a single report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator, SideBySide
from weather.cycle import Cycle, diverged
from weather.experiments.osse.rivals import (
    COSTLY,
    FEW,
    INTERPOLATION,
    SLOWER,
    SLOWEST,
    UNGUIDED,
    WITH_PAST,
    Rivals,
    first_background,
)
from weather.experiments.osse.scenarios import OsseTask, observed
from weather.experiments.osse.sealed_world import OsseWorld
from weather.experiments.twin.twin_tasks import score_cycle
from weather.experiments.twin.world import Period
from weather.metrics import Departures, withheld_points
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import observe
from weather.progress import Tick, no_tick
from weather.training.stream import generator

REPORTS, EVERY = 500, 5  # single reports, and cycles between two of a timeline
REPORT = 10  # key of random numbers
NORMAL = 1.96  # standard errors on either side of a 95 % interval


class Watched:
    """A method whose time is taken, and which is watched where nothing is observed.

    Args:
        method: The method.

    Attributes:
        seconds: CPU time of all analyses.
        analyses: Their number, a timeline each.
        changed: Largest change of a background that nothing was observed of.
    """

    def __init__(self, method: Assimilator) -> None:
        self.method, self.members = method, method.members
        self.seconds, self.analyses, self.changed = 0.0, 0, 0.0

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis of the method."""
        began = time.process_time()
        analysis = self.method.analyse(background, observations)
        self.seconds += time.process_time() - began
        self.analyses += len(background)
        silent = ~observations.mask.flatten(1).any(1)
        if bool(silent.any()):
            change = (analysis[silent] - background[silent]).abs().max()
            self.changed = max(self.changed, float(change))
        return analysis

    def tensors(self) -> dict[str, Tensor]:
        """Return milliseconds an analysis, and the largest change without an observation."""
        return {
            "milliseconds": torch.tensor(1000 * self.seconds / max(self.analyses, 1)),
            "changed": torch.tensor(self.changed),
        }


class OsseCycles:
    """Runs methods on the timelines of a world; every method sees the same observations.

    Args:
        world: The world.
        rivals: Its methods and forecast models.
        cycles: Cycles to run, all of the world's if None.
    """

    def __init__(self, world: OsseWorld, rivals: Rivals, cycles: int | None = None) -> None:
        self.world, self.rivals, self.cycles = world, rivals, cycles or world.cycles
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
        """Cycle a method and return the tensors of its scores, with its time.

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
                self.rivals.recorded.forecast(task),
                watched,
                first_background(self.world, period, method.members)[list(rows)],
                self.world.truth(period)[:cycles][:, list(rows)],
                (found for found, _ in zip(
                    observed(task, self.world, period, rows), range(cycles), strict=False)),
                area_weights=self.world.grid.area_weights(),
                climatological_sd=self.sd,
                hours=self.world.hours,
                guard=name not in UNGUIDED,
                departures=self._departures(period, rows) if verify and name not in WITH_PAST
                else None,
                tick=tick,
            )  # fmt: skip
        return {**scores.tensors(), **watched.tensors()}

    def _departures(self, period: Period, rows: Sequence[int]) -> Departures:
        """Withhold a tenth of the points of every timeline, in every tenth cycle."""
        members = list(self.world.members[period])
        points = [withheld_points(self.world.grid, self.world.seed, members[r], 6) for r in rows]
        return Departures(torch.stack(points), every=10)

    def score(self, task: OsseTask, name: str, method: Assimilator) -> float:
        """Return what tuning minimizes: the geometric mean of errors over standard deviations.

        It is over the channels of the timelines for tuning and validation, of what costs much over
        those of the first few. The root of the mean square is decided by the one timeline that is
        nearly lost.

        Raises:
            ValueError: A method refuses its setting, or an analysis cannot be computed.
        """
        count = FEW if name in COSTLY else len(self.world.members["choice"])
        cycles = self.cycles // SLOWER if name == SLOWEST else None
        found = self.run(task, name, method, "choice", range(count), cycles=cycles)
        return float((settled(found, self.sd) / self.sd).log().mean().exp())

    def over(self, task: OsseTask, methods: Sequence[Assimilator], base: Assimilator) -> float:
        """Return what the tuning of a correction minimizes: a cautious ratio to interpolation.

        It is the upper end of the 95 % interval, normal in the logarithm, over the timelines for
        tuning and validation. Interpolation itself has 1, so that a correction that does not beat
        it for sure is not chosen.

        Args:
            task: What is observed, and the forecast model.
            methods: The correction with the networks of some seeds.
            base: Interpolation.
        """
        count = len(self.world.members["choice"])
        rows = list(range(count)) * len(methods)
        own, other = (
            settled(self.run(task, INTERPOLATION, SideBySide(part), "choice", rows), self.sd)
            for part in (methods, [base] * len(methods))
        )
        ratio = (own / other).log().mean(1).unflatten(0, (-1, count)).mean(0)
        spread = ratio.std(correction=min(1, count - 1)) / math.sqrt(count)
        return float((ratio.mean() + NORMAL * spread).exp())

    def single_reports(
        self, task: OsseTask, method: Assimilator, interpolation: Assimilator, tick: Tick = no_tick
    ) -> dict[str, Tensor]:
        """Return errors of analyses of one report over those of the background.

        A report is of all variables at one point. Backgrounds are those of a cycle of interpolation
        after its first third, as long as it keeps the truth.

        Args:
            task: Of that cycle.
            method: What analyzes the single reports.
            interpolation: What cycles.
            tick: Called after every cycle.

        Returns:
            ``ratios`` (N,) and ``timelines`` (N,), whose they are.
        """
        world, rows = self.world, range(len(self.world.members["test"]))
        truths, found, lost = world.truth("test")[: self.cycles], [], torch.zeros(len(rows)) > 0
        run = Cycle(self.rivals.recorded.forecast(task), interpolation, world.hours).run(
            world.first_background("test"), observed(task, world, "test", rows)
        )
        with torch.no_grad():
            for number, (truth, step) in enumerate(zip(truths, run, strict=False)):
                lost |= diverged(step.analysis[:, 0] - truth, self.sd)
                step.analysis[lost] = truth[lost].unsqueeze(1)
                if number >= self.cycles // 3 and number % EVERY == 0:
                    reports = _one_report(world, truth, number)
                    analysis = method.analyse(step.background, reports)[:, 0]
                    before, after = (
                        world.grid.area_mean((states - truth)[:, 0].square()).sqrt()
                        for states in (step.background[:, 0], analysis)
                    )
                    kept = (~lost).nonzero().flatten()
                    found.append((kept, (after / before)[kept]))
                tick()
                if sum(len(kept) for kept, _ in found) >= REPORTS:
                    break
        timelines, ratios = (torch.cat(parts)[:REPORTS] for parts in zip(*found, strict=True))
        return {"ratios": ratios, "timelines": timelines}


def _one_report(world: OsseWorld, truth: Tensor, cycle: int) -> GriddedObservations:
    """Return one report of every timeline (B,C,H,W), anywhere on the grid."""
    networks, noise = torch.zeros(len(truth), *world.grid.shape, dtype=torch.bool), []
    for row in range(len(truth)):
        draw = generator(world.seed, row, REPORT, cycle)
        place = int(torch.randint(networks[row].numel(), (), generator=draw))
        networks[row].view(-1)[place] = True
        noise.append(observe(truth[row], networks[row], world.error_sd, generator=draw))
    return GriddedObservations.stack(noise)


def settled(found: dict[str, Tensor], climatological_sd: Tensor) -> Tensor:
    """Return the analysis RMSE (B,C) after the first third of the cycles.

    A lost timeline counts as climatology: as the climatological standard deviation.

    Args:
        found: Tensors of :meth:`OsseCycles.run`.
        climatological_sd: (C,).
    """
    analysis = found["analysis"]
    error = analysis[len(analysis) // 3 :].square().mean(0).sqrt()
    return torch.where(found["lost"][:, None], climatological_sd.to(error), error)
