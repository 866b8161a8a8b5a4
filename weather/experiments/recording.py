"""Record the backgrounds of a cycle, to train on errors that a cycle really makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, diverged
from weather.data.batch import generator
from weather.experiments.twin import TwinWorld
from weather.observations.network import bernoulli_network, observe

SETTLING = 40  # cycles before the first recorded one


class Recording(NamedTuple):
    """Backgrounds of R cycles over training members, at every ``stride``-th time.

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
    stride: int = 3,
    tick: Callable[[], None] = lambda: None,
) -> Recording:
    """Cycle over all training members with every density; half of the cycles err in the model.

    Args:
        world: Nature and forecast models.
        make_assimilator: Returns the method for a density, for example the tuned OI.
        densities: Shares of the grid points observed.
        stride: Cycles between two recorded backgrounds.
        tick: Called after every cycle, for progress.
    """
    parts = []
    for number, density in enumerate(densities):
        for model in (0, 1):
            members = torch.arange(len(world.members["training"]))
            members = members[(members + number) % 2 == model]
            parts.append(
                _record_part(world, make_assimilator, density, members, model, stride, tick)
            )
    time = parts[0].time
    columns = zip(*parts, strict=True)
    background, _, member, network, models, kept = (list(column) for column in columns)
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
    stride: int,
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
    forecast = (world.model, world.imperfect)[model]
    cycle = Cycle(forecast, make_assimilator(density), world.hours)
    first = world.first_background("training")[members]
    sd = world.climatological_sd()
    lost = torch.zeros(len(members), dtype=torch.bool)
    backgrounds, kept, times = [], [], []
    for number, (now, step) in enumerate(zip(truth, cycle.run(first, observations), strict=True)):
        lost |= diverged(step.analysis[:, 0] - now, sd)
        step.analysis[lost] = now[lost].unsqueeze(1)
        if number >= SETTLING and number % stride == 0:
            backgrounds.append(step.background[:, 0].float())
            kept.append(~lost)
            times.append(number)
        tick()
    return Recording(
        torch.stack(backgrounds),
        torch.tensor(times),
        members,
        networks,
        torch.full_like(members, model),
        torch.stack(kept),
    )


def save_recording(path: Path, recording: Recording) -> None:
    """Write a recording atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in recording._asdict().items()}, partial)
    partial.replace(path)


def load_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        GatesError: The file is missing or damaged.
    """
    try:
        return Recording(**load_file(path))
    except (FileNotFoundError, SafetensorError, TypeError) as error:
        raise GatesError(
            f"{path} is not a readable recording ({error}): delete it and run "
            "`gates weather prepare` again"
        ) from error
