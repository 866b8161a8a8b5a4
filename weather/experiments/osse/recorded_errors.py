"""Background errors that optimal interpolation makes over training members: B, and problems.

Networks train on such pairs of a background and its truth; a covariance that is sampled from them
gives interpolation the same data. A correction of interpolation begins its timelines with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing, short_digest
from weather.baselines.covariance import Covariance, DenseCovariance, GridPoints, gaspari_cohn
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.cycle import Cycle, Forecast, diverged
from weather.experiments.osse.sealed_world import OsseWorld
from weather.experiments.twin.scenarios import DENSEST, SPARSEST, OsseTask, observed
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.progress import Tick, no_tick
from weather.training.correction_module import LATER_HOURS
from weather.training.stream import AssimilationBatch, generator

TURNS = (1, 2)
SETTLED, STRIDE = {True: 20, False: 60}, 2
"""First recorded cycle, by whether the network is sparse, and cycles between two recorded ones."""

ENOUGH = 0.7  # climatological standard deviations beyond which an error is that of a lost cycle
DOUBLINGS, KEPT = 4, 0.5
SPARSE = 0.05  # density below which the recording takes the settings for sparse networks
FIRST = {True: (10_000.0, 0.06), False: (2_700.0, 0.05)}
SECOND = {True: (10_000.0, 0.2), False: (6_000.0, 0.5)}
"""Length (km) and scale of the interpolation that records, by whether the network is sparse.

The scale is doubled as long as more than half of the members are lost."""


def tapered(matrix: Tensor, grid: Grid, length_km: float) -> DenseCovariance:
    """Return a covariance (n,n) localized by a Schur product with Gaspari-Cohn.

    Args:
        matrix: Covariance of states (C,H,W), flattened.
        grid: Of the states.
        length_km: Half width of the taper.
    """
    points = GridPoints(grid)
    taper = gaspari_cohn(points.distances(torch.arange(points.count)) / length_km).to(matrix)
    blocks = matrix.view(len(matrix) // points.count, points.count, -1, points.count)
    return DenseCovariance((blocks * taper[:, None]).view_as(matrix))


class Recording(NamedTuple):
    """Background errors of training members that keep the truth, in order of their cycles.

    Attributes:
        errors: (N,C,H,W), background minus truth.
        cycle: (N,) of the analysis.
        member: (N,) row of the training period.
    """

    errors: Tensor
    cycle: Tensor
    member: Tensor


class RecordedErrors:
    """Errors of the backgrounds of optimal interpolation, recorded twice.

    First with the covariance of day differences, then with the covariance of the first recording.

    Args:
        world: Whose training members are cycled.
        folder: Where the errors are kept.
    """

    def __init__(self, world: OsseWorld, folder: Path) -> None:
        self.world, self.folder = world, folder

    def path(self, task: OsseTask, turn: int) -> Path:
        """Return the file of a recording, whose name says what it was made of."""
        world = self.world
        made_by = [SETTLED, FIRST, SECOND if turn > 1 else 0, world.imperfect.description]
        facts = [world.objects("training"), world.cycles, world.error_sd.tolist(), [*task], made_by]
        name = f"errors-{task.name.replace('/', '_')}-{turn}-{short_digest(facts, 8)}"
        return self.folder / f"{name}.safetensors"

    def missing(self, task: OsseTask) -> list[int]:
        """Return the turns of which there is no recording."""
        return [turn for turn in TURNS if not self.path(task, turn).is_file()]

    def make(self, task: OsseTask, turn: int, tick: Tick = no_tick) -> Path:
        """Record the errors of one turn; the second needs the first."""
        sparse, forecast = task.density < SPARSE, self.world.forecast(task.model)
        length, scale = (FIRST if turn == 1 else SECOND)[sparse]
        covariance: Covariance
        if turn == 1:
            covariance = self.world.background_covariance(length)
        else:
            covariance = self.covariance(task, 1, length)
        for doubled in range(DOUBLINGS + 1):
            interpolation = OptimalInterpolation(covariance, scale=scale * 2**doubled)
            recording, kept = _record(self.world, task, forecast, interpolation, tick)
            if kept >= KEPT and len(recording.errors) > 1:
                break
        else:
            raise GatesError(
                f"interpolation loses more than half of the training members of {task.name}, so "
                "that there are too few background errors to sample: take denser networks"
            )
        path = self.path(task, turn)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(recording._replace(errors=recording.errors.half())._asdict(), partial)
        return path

    def recording(self, task: OsseTask, turn: int) -> Recording:
        """Return a recording.

        Raises:
            GatesError: There is none, or it is damaged.
        """
        return _recording(self.path(task, turn))

    def covariance(self, task: OsseTask, turn: int, length_km: float) -> DenseCovariance:
        """Return B of a turn, localized with a half width."""
        path = self.path(task, turn)
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        return tapered(_moments(path, changed), self.world.grid, length_km)


def _recording(path: Path) -> Recording:
    try:
        recording = Recording(**load_file(path))
        return recording._replace(errors=recording.errors.float())
    except (OSError, SafetensorError, TypeError) as error:
        raise GatesError(
            f"{path} is missing or damaged ({type(error).__name__}): delete it and run "
            "`gates weather prepare`"
        ) from error


@lru_cache(maxsize=len(TURNS))  # of 150 MB at T21 each; trials of one process share them
def _moments(path: Path, changed: int) -> Tensor:  # noqa: ARG001
    """Return the mean product (n,n) of recorded errors, once until their file changes."""
    rows = _recording(path).errors.flatten(1)
    return rows.T @ rows / len(rows)


@torch.no_grad()
def _record(
    world: OsseWorld,
    task: OsseTask,
    forecast: Forecast,
    interpolation: OptimalInterpolation,
    tick: Tick,
) -> tuple[Recording, float]:
    """Return the errors of training members that keep the truth, and the fraction that does."""
    rows = range(len(world.members["training"]))
    settled = min(SETTLED[task.density < SPARSE], world.cycles // 2)
    sd, steps = world.climatological_sd(), Cycle(forecast, interpolation, world.hours)
    lost = torch.zeros(len(rows), dtype=torch.bool)
    recorded: list[Recording] = []
    first, truths = world.first_background("training"), world.truth("training")
    run = steps.run(first, observed(task, world, "training", rows))
    for number, (truth, step) in enumerate(zip(truths, run, strict=True)):
        error = step.background[:, 0] - truth
        lost |= diverged(step.analysis[:, 0] - truth, sd)
        step.analysis[lost] = truth[lost].unsqueeze(1)
        if number >= settled and (number - settled) % STRIDE == 0:
            near = world.grid.area_mean(error[:, 0].square()).sqrt() < ENOUGH * sd[0]
            kept = (~lost & near).nonzero().flatten()
            recorded.append(Recording(error[kept], torch.full_like(kept, number), kept))
        tick()
    recording = Recording(*(torch.cat(parts) for parts in zip(*recorded, strict=True)))
    return recording, float((~lost).float().mean())


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
        self.truth, self.sd = world.truth("training"), world.climatological_sd()
        self.ahead = round(LATER_HOURS / world.hours)
        self.block = min(BLOCK, world.cycles // 6)
        last = world.cycles - 1 - self.ahead - 2 * self.block
        self.recordings: dict[tuple[int, bool], Recording] = {}
        self.interpolations: dict[tuple[int, bool], OptimalInterpolation] = {}
        for key, task in tasks.items():
            pairs = recorded.recording(task, 2)
            early = pairs.cycle <= last
            if not bool(early.any()):
                raise GatesError(
                    f"no error was recorded before cycle {last} of {world.cycles}, so that no "
                    "timeline can begin: set cycles of the world to 240"
                )
            self.recordings[key] = Recording(*(part[early] for part in pairs))
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
        observations = self._observe(begun.network, truth, generator(self.seed, PROBLEM, step, row))
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
        analysis = background.clone()
        density = batch.observations.mask[:, 0].float().mean((-2, -1))
        for (model, sparse), interpolation in self.interpolations.items():
            rows = (batch.model == model) & ((density < SPARSE) == sparse)
            if bool(rows.any()):
                fields = GriddedObservations(*(part[rows] for part in batch.observations))
                analysis[rows] = interpolation.analyze(background[rows].unsqueeze(1), fields)[:, 0]
        return analysis
