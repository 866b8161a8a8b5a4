"""Cycles in a sealed world, the caution of corrections, and one analysis of a single report."""

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
    FOUR_D_VAR,
    INTERPOLATION,
    SLOWER,
    Rivals,
)
from weather.experiments.osse.sealed_world import OsseWorld
from weather.experiments.twin.scenarios import OsseTask, observed
from weather.experiments.twin.twin_cycles import TIME, TIME_RATIO, TwinCycles, settled
from weather.experiments.twin.world import TwinWorld
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import observe
from weather.progress import Tick, no_tick
from weather.training.stream import generator

REPORTS, EVERY = 500, 5  # single reports, and cycles between two of a timeline
REPORT = 10  # key of random numbers
TIMED = 20  # cycles of which half are timed: windows of 24 hours are full after four
NORMAL = 1.96  # standard errors on either side of a 95 % interval


class Timed:
    """A method that takes turns with interpolation in being the first to analyze, and timed.

    What comes second finds the background in the caches of the processor, and is not timed.

    Args:
        method: The method, whose analyses are returned.
        interpolation: What it is compared with.

    Attributes:
        seconds: CPU times of the method, then of interpolation, and so on.
    """

    def __init__(self, method: Assimilator, interpolation: Assimilator) -> None:
        self.method, self.interpolation = method, interpolation
        self.members, self.seconds = method.members, list[float]()

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis of the method."""
        other = len(self.seconds) % 2 == 1
        began = time.process_time()
        if other:
            self.interpolation.analyze(background[:, :1], observations)
        else:
            analysis = self.method.analyze(background, observations)
        self.seconds.append(time.process_time() - began)
        return self.method.analyze(background, observations) if other else analysis


class OsseCycles(TwinCycles):
    """Runs methods on the timelines of a world; every method sees the same observations.

    Args:
        world: The world.
        rivals: Its methods.
        cycles: Cycles to run, all of the world's if None.
    """

    def __init__(self, world: OsseWorld, rivals: Rivals, cycles: int | None = None) -> None:
        super().__init__(world, cycles)
        self.rivals = rivals

    def score(self, task: OsseTask, name: str, method: Assimilator) -> float:
        """Return what tuning minimizes; what costs much runs on the first few timelines.

        Raises:
            ValueError: A method refuses its setting, or an analysis cannot be computed.
        """
        rows = range(FEW) if name in COSTLY else None
        cycles = self.cycles // SLOWER if name in FOUR_D_VAR else None
        return self.error(self.run(task, name, method, "choice", rows, cycles=cycles))

    def times(
        self, task: OsseTask, name: str, method: Assimilator, interpolation: Assimilator
    ) -> dict[str, Tensor]:
        """Return the CPU time of one analysis of one timeline, and over that of interpolation.

        Both are medians over a few cycles, in which the two take turns.

        Args:
            task: What is observed, and the forecast model.
            name: Of the method.
            method: The method, which has analyzed nothing before.
            interpolation: What it is compared with.
        """
        timed = Timed(method, interpolation)
        self.run(task, name, timed, rows=[0], cycles=min(TIMED, self.cycles))
        seconds = torch.tensor(timed.seconds, dtype=torch.float64)
        first_time, other = (1000 * seconds[first::2].median() for first in (0, 1))
        return {TIME: first_time, TIME_RATIO: first_time / other}

    def over(self, task: OsseTask, methods: Sequence[Assimilator], base: Assimilator) -> float:
        """Return what the tuning of a correction minimizes: a cautious ratio to interpolation.

        It is the upper end of the 95 % interval, normal in the logarithm, over the timelines for
        tuning and validation. Interpolation itself has 1, so that no correction is chosen of which
        the interval reaches 1.

        Args:
            task: What is observed, and the forecast model.
            methods: The correction with the networks of some seeds.
            base: Interpolation.
        """
        count = len(self.world.members["choice"])
        rows = list(range(count)) * len(methods)
        first_errors, other = (
            settled(self.run(task, INTERPOLATION, SideBySide(part), "choice", rows), self.sd)
            for part in (methods, [base] * len(methods))
        )
        ratio = (first_errors / other).log().mean(1).unflatten(0, (-1, count)).mean(0)
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
        truths, single, lost = world.truth("test")[: self.cycles], [], torch.zeros(len(rows)) > 0
        run = Cycle(self.world.forecast(task.model), interpolation, world.hours).run(
            world.first_background("test"), observed(task, world, "test", rows)
        )
        with torch.no_grad():
            for number, (truth, step) in enumerate(zip(truths, run, strict=False)):
                lost |= diverged(step.analysis[:, 0] - truth, self.sd)
                step.analysis[lost] = truth[lost].unsqueeze(1)
                if number >= self.cycles // 3 and number % EVERY == 0:
                    reports = _one_report(world, truth, number)
                    analysis = method.analyze(step.background, reports)[:, 0]
                    before, after = (
                        world.grid.area_mean((states - truth)[:, 0].square()).sqrt()
                        for states in (step.background[:, 0], analysis)
                    )
                    kept = (~lost).nonzero().flatten()
                    single.append((kept, (after / before)[kept]))
                tick()
                if sum(len(kept) for kept, _ in single) >= REPORTS:
                    break
        timelines, ratios = (torch.cat(parts)[:REPORTS] for parts in zip(*single, strict=True))
        return {"ratios": ratios, "timelines": timelines}


def _one_report(world: TwinWorld, truth: Tensor, cycle: int) -> GriddedObservations:
    """Return one report of every timeline (B,C,H,W), anywhere on the grid."""
    networks, noise = torch.zeros(len(truth), *world.grid.shape, dtype=torch.bool), []
    for row in range(len(truth)):
        draw = generator(world.seed, row, REPORT, cycle)
        networks[row].view(-1)[int(torch.randint(networks[row].numel(), (), generator=draw))] = True
        noise.append(observe(truth[row], networks[row], world.error_sd, generator=draw))
    return GriddedObservations.stack(noise)
