"""What is observed in a twin world: fixed networks, outages, and reports of mixed quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from weather.experiments.twin.world import Period, TwinWorld
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.training.stream import generator

Protocol = Literal["osse", "outage", "mixed"]
"""Which tasks are scored."""

ForecastName = Literal["perfect", "error"]
MODELS: tuple[ForecastName, ...] = ("perfect", "error")

POOR = 5.0  # error of a poor report over the nominal one
SPARSEST, DENSEST = 0.003, 0.3  # densities of mixed reports
DAY = 4  # cycles
GAP, FIRST_GAP, STAGGER = 10 * DAY, 30 * DAY, 3
MIXED = 9  # key of random numbers


class OsseTask(NamedTuple):
    """What every method is scored on.

    Attributes:
        name: In settings and tables, such as ``0.01/perfect``.
        density: Fraction of grid points observed, the geometric mean where it varies.
        model: ``"perfect"`` or ``"error"``.
        reports: ``"fixed"`` for a network that stays, ``"outage"`` for one that is silent for ten
            days; ``"declared"``, ``"withheld"`` and ``"denied"`` for mixed quality.
        chosen_for: Task whose tuned settings it has.
    """

    name: str
    density: float
    model: ForecastName
    reports: Literal["fixed", "outage", "declared", "withheld", "denied"]
    chosen_for: str

    @property
    def base(self) -> OsseTask:
        """The task whose tuned settings and recorded errors this one has."""
        reports: Literal["fixed", "declared"] = (
            "fixed" if self.reports in ("fixed", "outage") else "declared"
        )
        return self._replace(name=self.chosen_for, reports=reports)


def osse_tasks(protocol: Protocol, densities: Sequence[float]) -> list[OsseTask]:
    """Return the tasks of a protocol, the sparsest with the perfect model first."""
    if protocol == "mixed":
        mean = math.sqrt(SPARSEST * DENSEST)
        return [
            OsseTask(f"mixed/{reports}", mean, "perfect", reports, "mixed/declared")
            for reports in ("declared", "withheld", "denied")
        ]
    if protocol == "outage":
        return [
            OsseTask(
                f"{density:.3g}/outage", density, "perfect", "outage", f"{density:.3g}/perfect"
            )
            for density in sorted(densities)
        ]
    return fixed_tasks(sorted(densities))


def fixed_tasks(densities: Sequence[float]) -> list[OsseTask]:
    """Return every density with the perfect model, then with the imperfect one."""
    names = [
        (f"{density:.3g}/{model}", density, model) for model in MODELS for density in densities
    ]
    return [OsseTask(name, density, model, "fixed", name) for name, density, model in names]


def gap_of(row: int) -> range:
    """Return the cycles in which a timeline of an outage is silent: not the same for all of them.

    Args:
        row: Number of the timeline.
    """
    first = FIRST_GAP + STAGGER * (row % 5)
    return range(first, first + GAP)


def observed(
    task: OsseTask, world: TwinWorld, period: Period, rows: Sequence[int]
) -> Iterator[GriddedObservations]:
    """Yield the observations (B,C,H,W) of every cycle, the same at each call.

    Args:
        task: What is observed.
        world: Its truth and errors.
        period: Whose timelines.
        rows: Numbers of the timelines in the period.
    """
    if task.reports in ("fixed", "outage"):
        for cycle, given in enumerate(world.observations(period, task.density)):
            heard = torch.tensor(
                [task.reports == "fixed" or cycle not in gap_of(row) for row in rows]
            )
            kept = GriddedObservations(given.values[list(rows)], given.errors[list(rows)])
            yield kept.withhold(heard[:, None, None, None])
        return
    member = list(world.members[period])
    for cycle, truth in enumerate(world.truth(period)):
        drawn = [generator(world.seed, member[row], MIXED, cycle) for row in rows]
        yield GriddedObservations.stack(
            [VARIANTS[task.reports](*_mixed(world, truth[row], draw), world.error_sd)
             for row, draw in zip(rows, drawn, strict=True)]
        )  # fmt: skip


def _mixed(
    world: TwinWorld, truth: Tensor, draw: torch.Generator
) -> tuple[GriddedObservations, Tensor]:
    """Return reports of which half have large errors, as stated, and where they are (H,W)."""
    low, high = math.log(SPARSEST), math.log(DENSEST)
    density = math.exp(low + (high - low) * torch.rand((), generator=draw).item())
    network = drawn_network(world.grid, density, draw)
    poor = torch.rand(world.grid.shape, generator=draw) < 0.5
    errors = world.error_sd[:, None, None] * torch.where(poor, POOR, 1.0)
    return observe(truth, network, errors, generator=draw), poor


def _denied(given: GriddedObservations, poor: Tensor, error_sd: Tensor) -> GriddedObservations:  # noqa: ARG001
    nominal = error_sd[:, None, None].expand_as(given.errors)
    return GriddedObservations(given.values, torch.where(given.mask, nominal, torch.inf))


VARIANTS: dict[str, Callable[[GriddedObservations, Tensor, Tensor], GriddedObservations]] = {
    "declared": lambda given, poor, error_sd: given,  # noqa: ARG005
    "withheld": lambda given, poor, error_sd: given.withhold(~poor),  # noqa: ARG005
    "denied": _denied,
}
"""What becomes of poor reports: their errors are stated, they are left out, or stated as good."""
