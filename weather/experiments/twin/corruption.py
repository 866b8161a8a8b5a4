"""Whether an analysis gives less weight to bad observations that are declared as bad."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, diverged
from weather.experiments.twin.evaluation import TwinEvaluation, TwinTask
from weather.experiments.twin.world import Period
from weather.observations.gridded import GriddedObservations
from weather.training.batch import generator

FACTOR = 5.0  # errors of the corrupted half over nominal ones
CERTAIN = 0.01  # stated errors over nominal ones, which make the confidence one


class Corruption(NamedTuple):
    """RMSE of analyses with a corrupted half over that of analyses without this half.

    Both are means over the channels.

    Attributes:
        declared: The large errors are stated, so that the confidence is low.
        denied: They are stated as nominal, so that the confidence is as high as elsewhere.
        forced: They are stated as next to nothing, so that the confidence is one.
    """

    declared: float
    denied: float
    forced: float


@torch.no_grad()
def corrupt_half(
    task: TwinTask,
    evaluation: TwinEvaluation,
    assimilator: Assimilator,
    *,
    period: Period = "test",
    tick: Callable[[], None] = lambda: None,
) -> Corruption:
    """Analyze with half of the observations corrupted, from the backgrounds of a clean cycle.

    The first third of the cycles is dropped, and lost timelines from then on. There is no quality
    control.

    Args:
        task: Density and forecast model.
        evaluation: The experiment.
        assimilator: A method with one member.
        period: Whose timelines.
        tick: Called after every cycle.
    """
    world, cycles = evaluation.world, evaluation.cycles
    first = world.first_background(period)
    truths = world.truth(period)[:cycles]
    clean = zip(range(cycles), world.observations(period, task.density), strict=False)
    cycle = Cycle(evaluation.forecast(task), assimilator, world.hours)
    steps = cycle.run(first, (observations for _, observations in clean))
    lost = torch.zeros(len(first), dtype=torch.bool)
    squares = []
    for number, (truth, step) in enumerate(zip(truths, steps, strict=True)):
        lost |= diverged(step.analysis[:, 0] - truth, evaluation.climatological_sd)
        step.analysis[lost] = truth[lost].unsqueeze(1)
        if number >= cycles // 3:
            draw = generator(world.seed, 7, number)
            errors = [
                world.grid.area_mean(
                    (assimilator.analyse(step.background, seen)[:, 0] - truth) ** 2
                )
                for seen in _variants(truth, step.observations, draw)
            ]
            squares.append(torch.stack(errors)[:, ~lost])
        tick()
    withheld, *corrupted = torch.cat(squares, 1).mean(1).sqrt()
    return Corruption(*(float((error / withheld).mean()) for error in corrupted))


def _variants(
    truth: Tensor, observations: GriddedObservations, draw: torch.Generator
) -> tuple[GriddedObservations, ...]:
    """Return the observations without a half, and with it corrupted: declared, denied, forced."""
    hit = torch.rand(truth[:, :1].shape, generator=draw) < 0.5
    hit = hit & observations.mask
    nominal = torch.where(hit, observations.errors, 0)
    noise = torch.randn(truth.shape, generator=draw)
    values = torch.where(hit, truth + FACTOR * nominal * noise, observations.values)
    stated = (
        torch.where(hit, factor * observations.errors, observations.errors)
        for factor in (FACTOR, 1.0, CERTAIN)
    )
    corrupted = (GriddedObservations(values, errors) for errors in stated)
    return observations.withhold(~hit), *corrupted
