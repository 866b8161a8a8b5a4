"""Record the backgrounds of a cycle, to train on the errors that occur in a cycle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, diverged
from weather.experiments.experiment import differences
from weather.experiments.twin.world import TwinWorld
from weather.observations.simulated import bernoulli_network, observe
from weather.training.stream import generator

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
            found = (file.metadata() or {}).get("origin", origin)
            recording = Recording(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise GatesError(
            f"{path} is not a readable recording ({error}): delete it and run "
            "`gates weather prepare` again"
        ) from error
    if found != origin:
        raise GatesError(
            f"{path} was recorded in another world ({differences(found, origin)}): delete it and "
            "run `gates weather prepare` again, or name another file"
        )
    return recording
