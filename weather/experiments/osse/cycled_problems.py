"""Problems for training a correction of interpolation inside its own cycle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.cycle import Forecast
from weather.experiments.osse.recorded_errors import SECOND, SPARSE, RecordedErrors, Recording
from weather.experiments.osse.sealed_world import OsseWorld
from weather.experiments.twin.scenarios import DENSEST, SPARSEST, OsseTask
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.training.correction_module import LATER_HOURS
from weather.training.stream import AssimilationBatch, generator

POOL = 96  # timelines under way
BLOCK = 40  # cycles until a timeline begins again, and those of the longest outage, at most
AMPLITUDE = (0.3, 3.0)  # of the recorded errors that timelines begin with
OUTAGES, SILENT, SINGLE = 0.125, 0.03, 0.03
"""Fractions of the timelines that begin after an outage, of the problems without a report, and of
those with a single one."""

ORDER, AGE, BEGIN, PROBLEM = 20, 21, 22, 23  # keys of random numbers


class Begun(NamedTuple):
    """How a timeline began.

    Attributes:
        model: 0 for the perfect forecast model, 1 for the imperfect one.
        member: Row of the training period.
        cycle: In which its error was recorded.
        error: (C,H,W) that it begins with.
        outage: Cycles without a report before the first analysis.
        network: (H,W), observed points.
    """

    model: int
    member: int
    cycle: int
    error: Tensor
    outage: int
    network: Tensor


class CycledProblems:
    """Deals problems to timelines under way, of which every step takes some.

    A timeline begins with a recorded error of interpolation at the time and member that it was
    recorded at, times a random factor, perhaps after an outage; it keeps its network and forecast
    model for 40 cycles, a sixth of those of a short world. Networks have between 0.3 and 30 % of
    the points. Row k of a batch of K takes the timelines k, k + K, ... in random order, all of them
    before one comes again, so that every draw is a function of the step and the row alone.

    Args:
        world: Whose training members.
        recorded: Errors of interpolation.
        tasks: With fixed networks; the sparse and the dense one with either model.
        forecasts: The perfect and the imperfect forecast model.
        rows: Rows of a batch over all ranks.
        seed: Of all random numbers.

    Raises:
        GatesError: The world has too few cycles, or a recording is missing.
    """

    def __init__(
        self,
        world: OsseWorld,
        recorded: RecordedErrors,
        tasks: Mapping[tuple[int, bool], OsseTask],
        forecasts: tuple[Forecast, Forecast],
        rows: int,
        seed: int,
    ) -> None:
        self.world, self.forecasts, self.rows, self.seed = world, forecasts, rows, seed
        self.groups = max(1, POOL // rows)
        self.pool = self.groups * rows
        self.truth = world.truth("training")
        self.sd = world.climatological_sd()
        self.ahead = round(LATER_HOURS / world.hours)
        self.block = min(BLOCK, world.cycles // 6)
        last = world.cycles - 1 - self.ahead - 2 * self.block
        self.recordings: dict[tuple[int, bool], Recording] = {}
        self.interpolations: dict[tuple[int, bool], OptimalInterpolation] = {}
        for key, task in tasks.items():
            found = recorded.recording(task, 2)
            early = found.cycle <= last
            if not bool(early.any()):
                raise GatesError(
                    f"no error was recorded before cycle {last} of {world.cycles}, so that no "
                    "timeline can begin: set cycles of the world to 240"
                )
            self.recordings[key] = Recording(*(part[early] for part in found))
            length, scale = SECOND[key[1]]
            covariance = recorded.covariance(task, 2, length)
            self.interpolations[key] = OptimalInterpolation(covariance, scale=scale, cache_mib=256)

    def problem(self, step: int, row: int) -> AssimilationBatch:
        """Return the problem of a row at a step, without batch dimension."""
        turn, position = divmod(step, self.groups)
        order = torch.randperm(self.groups, generator=generator(self.seed, ORDER, turn, row))
        timeline = row + self.rows * int(order[position])
        first = int(torch.randint(self.block, (), generator=generator(self.seed, AGE, timeline)))
        number, age = divmod(first + turn, self.block)
        if not number:
            age = turn
        begun = self._begin(timeline, number)
        now = begun.cycle + begun.outage + age
        truth = self.truth[now, begun.member]
        draw = generator(self.seed, PROBLEM, step, row)
        observations = self._observe(begun.network, truth, draw)
        background = truth + begun.error
        if begun.outage and not age:
            start = self.truth[begun.cycle, begun.member] + begun.error
            hours = begun.outage * self.world.hours
            background = self.forecasts[begun.model](start.unsqueeze(0), hours)[0]
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(age == 0),
            background=background,
            truth=truth,
            observations=observations,
            background_sd=self.sd,
            model=torch.tensor(begun.model),
            later=self.truth[now + self.ahead, begun.member],
        )

    def _begin(self, timeline: int, number: int) -> Begun:
        draw = generator(self.seed, BEGIN, timeline, number)
        chance = torch.rand(3, generator=draw).tolist()
        low, high = math.log(SPARSEST), math.log(DENSEST)
        density = math.exp(low + (high - low) * chance[0])
        model = int(chance[1] < 0.5)
        recording = self.recordings[model, density < SPARSE]
        index = int(torch.randint(len(recording.errors), (), generator=draw))
        low, high = math.log(AMPLITUDE[0]), math.log(AMPLITUDE[1])
        factor = math.exp(low + (high - low) * float(torch.rand((), generator=draw)))
        outage = int(torch.randint(1, self.block + 1, (), generator=draw))
        return Begun(
            model,
            int(recording.member[index]),
            int(recording.cycle[index]),
            factor * recording.errors[index],
            outage if chance[2] < OUTAGES else 0,
            drawn_network(self.world.grid, density, draw),
        )

    def _observe(
        self, network: Tensor, truth: Tensor, draw: torch.Generator
    ) -> GriddedObservations:
        """Return the reports of a network, now and then one alone or none."""
        chance = float(torch.rand((), generator=draw))
        if chance < SILENT + SINGLE:
            place = int(torch.randint(network.numel(), (), generator=draw))
            network = torch.zeros_like(network)
            if chance < SINGLE:
                network.view(-1)[place] = True
        return observe(truth, network, self.world.error_sd, generator=draw)

    def interpolated(self, batch: AssimilationBatch, background: Tensor) -> Tensor:
        """Return the analyses (B,C,H,W) of interpolation, by its forecast model and density."""
        found = background.clone()
        density = batch.observations.mask[:, 0].float().mean((-2, -1))
        for (model, sparse), interpolation in self.interpolations.items():
            rows = (batch.model == model) & ((density < SPARSE) == sparse)
            if bool(rows.any()):
                fields = GriddedObservations(*(part[rows] for part in batch.observations))
                found[rows] = interpolation.analyse(background[rows].unsqueeze(1), fields)[:, 0]
        return found
