"""Assimilation problems from a twin world: recorded backgrounds, then its own cycle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.baselines.assimilator import Assimilator
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.cycle import Cycle, diverged
from weather.data.writing import differences
from weather.experiments.twin.twin_experiment import TwinExperiment
from weather.experiments.twin.world import LEAD, TwinWorld
from weather.observations.simulated import bernoulli_network, drawn_network, observe
from weather.progress import Progress, silent
from weather.training.stream import AssimilationBatch, generator

TRANSIENT = 40  # first cycles, all recorded: a cycle must also find its way to the truth
STRIDE = 3  # cycles between two recorded ones after that


class Recording(NamedTuple):
    """Backgrounds of R cycles over training members.

    Attributes:
        background: (N,R,C,H,W) float32.
        time: (N,) index into the truth of the period.
        member: (R,) row of the training period.
        network: (R,H,W) bool, the fixed network of each cycle.
        model: (R,) 0 for the perfect forecast model, 1 for the imperfect one.
        kept: (N,R) bool, False once a cycle has lost the truth.
    """

    background: Tensor
    time: Tensor
    member: Tensor
    network: Tensor
    model: Tensor
    kept: Tensor


def record(
    world: TwinWorld,
    make_assimilator: Callable[[float], Assimilator],
    densities: tuple[float, ...],
    *,
    transient: int = TRANSIENT,
    stride: int = STRIDE,
    tick: Callable[[], None] = lambda: None,
) -> Recording:
    """Cycle all training members with every density; half of the cycles use the imperfect model.

    Args:
        world: Nature and forecast models.
        make_assimilator: Returns the method for a density, for example the tuned OI.
        densities: Fractions of the grid points observed.
        transient: Cycles at the start that are all recorded.
        stride: Cycles between two recorded backgrounds after that.
        tick: Called after every cycle, for progress.
    """
    start = min(transient, world.cycles)
    recorded = [*range(start), *range(start, world.cycles, stride)]
    parts = []
    for number, density in enumerate(densities):
        for model in (0, 1):
            members = torch.arange(len(world.members["training"]))
            members = members[(members + number) % 2 == model]
            parts.append(
                _record_part(world, make_assimilator, density, members, model, recorded, tick)
            )
    time = parts[0].time
    background, _, member, network, models, kept = (
        list(column) for column in zip(*parts, strict=True)
    )
    return Recording(
        torch.cat(background, 1),
        time,
        torch.cat(member),
        torch.cat(network),
        torch.cat(models),
        torch.cat(kept, 1),
    )


def _record_part(
    world: TwinWorld,
    make_assimilator: Callable[[float], Assimilator],
    density: float,
    members: Tensor,
    model: int,
    recorded: list[int],
    tick: Callable[[], None],
) -> Recording:
    truth = world.truth("training")[:, members]
    seeds = [
        generator(world.seed, 3, int(member), model, round(density * 1e6)).initial_seed()
        for member in members
    ]
    networks = torch.stack([bernoulli_network(world.grid, density, seed=s) for s in seeds])
    noise = generator(world.seed, 4, model, round(density * 1e6))
    observations = (
        observe(now, networks[:, None], world.error_sd, generator=noise) for now in truth
    )
    cycle = Cycle((world.model, world.imperfect)[model], make_assimilator(density), world.hours)
    first = world.first_background("training")[members]
    sd = world.climatological_sd()
    lost = torch.zeros(len(members), dtype=torch.bool)
    backgrounds, kept = [], []
    for number, (now, step) in enumerate(zip(truth, cycle.run(first, observations), strict=True)):
        lost |= diverged(step.analysis[:, 0] - now, sd)
        step.analysis[lost] = now[lost].unsqueeze(1)
        if number in recorded:
            backgrounds.append(step.background[:, 0].float())
            kept.append(~lost)
        tick()
    return Recording(
        torch.stack(backgrounds),
        torch.tensor(recorded),
        members,
        networks,
        torch.full_like(members, model),
        torch.stack(kept),
    )


def save_recording(path: Path, recording: Recording, origin: str) -> None:
    """Write a recording atomically, with a line that says what it was made of."""
    tensors = {name: value.contiguous() for name, value in recording._asdict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"origin": origin})


def load_recording(path: Path, origin: str) -> Recording:
    """Read a recording.

    Args:
        path: File of `save_recording`.
        origin: What it must have been made of; not compared where the file does not say it.

    Raises:
        GatesError: The file is missing, damaged, or of another origin.
    """
    try:
        with safe_open(path, framework="pt") as file:
            world = (file.metadata() or {}).get("origin", origin)
            recording = Recording(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise GatesError(
            f"{path} is not a readable recording ({error}): delete it and run "
            "`gates weather prepare` again"
        ) from error
    if world != origin:
        raise GatesError(
            f"{path} was recorded in another world ({differences(world, origin)}): delete it and "
            "run `gates weather prepare` again, or name another file"
        )
    return recording


class TwinSource(TwinExperiment):
    """Problems for `weather.training.adas_module.AdasModule` from a `TwinWorld`.

    Stage 1 draws recorded backgrounds of a tuned OI cycle at random. Stage 2 deals every timeline
    contiguous blocks: the first background is recorded, the others are the module's own forecasts.
    In half of the problems every point has a separate observation error, log-uniform between 0.5
    and 10 times the nominal one, so that the confidence carries information.

    Args:
        world: Nature, forecast models and observation errors.
        recording: File of recorded backgrounds, made when missing.
        densities: Fractions of grid points observed in the recorded cycles.
        scales: Scale of the OI background covariance for each density.
        length_km: Localization half-width of that covariance.
        recorded_steps: Steps of stage 1.
        block: Cycles of a block in stage 2.
        redraw_share: Fraction of the stage-1 problems that are observed by a fresh network.
        transient: Cycles at the start of a recorded cycle that are all kept; then every third.
        seed: Seed of all random numbers.

    Raises:
        ValueError: The scales do not fit the densities, or a number is out of range.
    """

    def __init__(
        self,
        world: TwinWorld,
        recording: str,
        densities: tuple[float, ...] = (0.1, 0.01),
        scales: tuple[float, ...] = (0.02, 0.1),
        length_km: float = 2000.0,
        recorded_steps: int = 1000,
        block: int = 40,
        redraw_share: float = 0.25,
        transient: int = TRANSIENT,
        seed: int = 0,
    ) -> None:
        if len(densities) != len(scales):
            raise ValueError(f"{len(densities)} densities need as many scales, got {len(scales)}")
        if recorded_steps < 0 or block < 1 or transient < 0:
            raise ValueError(
                "need recorded_steps >= 0, block >= 1 and transient >= 0, got "
                f"{recorded_steps}, {block} and {transient}"
            )
        super().__init__(world)
        self.path = Path(recording)
        self.densities, self.scales, self.length_km = densities, scales, length_km
        self.recorded_steps, self.block, self.redraw_share = recorded_steps, block, redraw_share
        self.transient, self.seed = transient, seed

    def prepare(self, progress: Progress = silent) -> None:
        """Make the nature run and the recording where they are missing."""
        list(self.make(self.path.parent, progress))

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Do the same, and yield their paths."""
        self.make_truth(progress)
        yield self.world.path
        if not self.path.exists():
            with progress("recording backgrounds", self.num_cycles) as tick:
                self.write_recording(tick=tick)
        yield self.path

    def check(self) -> None:
        """Refuse an existing nature run or recording that is not that of the configuration.

        Raises:
            GatesError: It is damaged or belongs to another world.
        """
        if self.world.path.exists():
            self.world.prepare()
        if self.path.exists():
            load_recording(self.path, self.origin)

    @property
    def num_cycles(self) -> int:
        """Return how many cycles, each of many members at once, `write_recording` runs."""
        return 2 * len(self.densities) * self.world.cycles

    @property
    def origin(self) -> str:
        """What a recording of this source is made of, in one line."""
        world = self.world
        facts = {
            "model": world.model.description,
            "imperfect": world.imperfect.description,
            "members": world.num_members,
            "training": len(world.members["training"]),
            "cycles": world.cycles,
            "spin_up_days": world.spin_up_days,
            "hours": world.hours,
            "world_seed": world.seed,
            "error_sd": [round(value, 6) for value in world.error_sd.tolist()],
            "densities": list(self.densities),
            "scales": list(self.scales),
            "length_km": self.length_km,
            "transient": self.transient,
        }
        return json.dumps(facts, sort_keys=True)

    def write_recording(self, tick: Callable[[], None] = lambda: None) -> None:
        """Run the OI cycles of the recording and keep their backgrounds.

        Args:
            tick: Called after every cycle.
        """
        scales = dict(zip(self.densities, self.scales, strict=True))
        covariance = self.world.background_covariance(self.length_km)
        recording = record(
            self.world,
            lambda density: OptimalInterpolation(covariance, scale=scales[density]),
            self.densities,
            transient=self.transient,
            tick=tick,
        )
        save_recording(self.path, recording, self.origin)

    def setup(self) -> None:
        """Load nature and recording, and the units of the training period.

        Raises:
            GatesError: The recording is missing, damaged, unusable, or of another world.
        """
        self.recording = load_recording(self.path, self.origin)
        if not self.recording.kept[self.recording.time <= self.world.cycles - self.block].any():
            raise GatesError(
                f"{self.path} holds no background that did not lose the truth and has "
                f"{self.block} cycles to come: change scales, or take more cycles or a smaller "
                "block, and record again"
            )
        self.normalizer = self.world.normalizer()
        truth = self.world.truth("training")[self.recording.time][:, self.recording.member]
        error = self.grid.area_mean((self.recording.background - truth).square())
        self.background_sd = error[self.recording.kept].mean(0).sqrt()

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> AssimilationBatch:
        """Return the problem of a timeline at a step."""
        if validation:
            return self._validation(step, timeline)
        if step < self.recorded_steps:
            return self._recorded(step, timeline)
        block, position = divmod(step - self.recorded_steps, self.block)
        return self._cycled(block, position, timeline)

    def _recorded(self, step: int, timeline: int) -> AssimilationBatch:
        draw = generator(self.seed, 0, step, timeline)
        index, row = self._draw_kept(draw)
        network = self.recording.network[row]
        if bool(torch.rand((), generator=draw) < self.redraw_share):
            low, high = math.log(min(self.densities)), math.log(max(self.densities))
            density = math.exp(low + (high - low) * torch.rand((), generator=draw).item())
            network = drawn_network(self.grid, density, draw)
        return self._problem(timeline, True, index, row, 0, network, draw)

    def _cycled(self, block: int, position: int, timeline: int) -> AssimilationBatch:
        start = generator(self.seed, 1, block, timeline)
        times = self.recording.time
        index, row = self._draw_kept(start, int((times <= self.world.cycles - self.block).sum()))
        draw = generator(self.seed, 2, block, timeline, position)
        return self._problem(
            timeline, position == 0, index, row, position, self.recording.network[row], draw
        )

    def _draw_kept(self, draw: torch.Generator, limit: int | None = None) -> tuple[int, int]:
        """Draw a recorded background of a cycle that has not lost the truth."""
        kept = self.recording.kept[:limit].nonzero()
        index, row = kept[int(torch.randint(len(kept), (), generator=draw))].tolist()
        return index, row

    def _problem(
        self,
        timeline: int,
        reset: bool,
        index: int,
        row: int,
        offset: int,
        network: Tensor,
        draw: torch.Generator,
    ) -> AssimilationBatch:
        truth = self.world.truth("training")[
            int(self.recording.time[index]) + offset, self.recording.member[row]
        ]
        errors = self.world.error_sd[:, None, None].expand_as(truth)
        if bool(torch.rand((), generator=draw) < 0.5):
            # One factor a point: a poor station is poor in all variables.
            factor = torch.rand(truth.shape[1:], generator=draw) * math.log(20.0) + math.log(0.5)
            errors = errors * factor.exp()
        observations = observe(truth, network, errors, generator=draw)
        background = self.recording.background[index, row]
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(reset),
            background=background,
            truth=truth,
            observations=observations,
            background_sd=self.background_sd,
            model=self.recording.model[row],
        )

    def _validation(self, step: int, timeline: int) -> AssimilationBatch:
        """Cycle the validation members from the truth of 24 hours before, alternating densities."""
        density = self.densities[timeline % len(self.densities)]
        member = timeline % len(self.world.members["validation"])
        states = self.world.states("validation")[:, member]
        if LEAD + step >= len(states):
            raise GatesError(
                f"validation cycle {step + 1} is beyond the {self.world.cycles} cycles of the "
                f"world: set data.validation_steps to {self.world.cycles} or less"
            )
        network = self.world.networks("validation", density)[member]
        draw = generator(self.seed, 3, step, timeline)
        truth = states[LEAD + step]
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(step == 0),
            background=states[0],
            truth=truth,
            observations=observe(truth, network, self.world.error_sd, generator=draw),
            background_sd=self.background_sd,
            model=torch.tensor(0),
        )
