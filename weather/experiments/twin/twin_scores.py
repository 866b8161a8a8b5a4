"""Scores of cycles in a twin world: errors, ratios to interpolation, time and lost timelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, moments, root, root_ratio
from weather.baselines.assimilator import Assimilator, SideBySide
from weather.experiments.experiment import (
    Example,
    Load,
    Method,
    Settings,
    Work,
    built,
    classical,
)
from weather.experiments.twin.scenarios import OsseTask
from weather.experiments.twin.twin_cycles import DEPARTURES, TIMES, TwinCycles, settled
from weather.metrics import DepartureSums, departure_rows
from weather.observations.gridded import GriddedObservations
from weather.progress import Tick, no_tick

INTERPOLATION = "oi"  # what all others are compared with


class CycledScores:
    """Keeps what cycles found, and turns it into rows.

    The statistic of a comparison is the exponential of the mean log ratio of settled errors of the
    first channel over timelines, networks averaged; its interval resamples timelines.

    Args:
        cycles: The timelines.
        tasks: The tasks.
        settings: Tuned settings of all methods.
    """

    def __init__(self, cycles: TwinCycles, tasks: Sequence[OsseTask], settings: Settings) -> None:
        self.cycles, self.tasks, self.settings = cycles, list(tasks), settings
        self.labels, self.climatological_sd = cycles.world.channels.labels, cycles.sd
        self.timelines = len(cycles.world.members["test"])
        self.scores: dict[tuple[str, str], dict[str, Tensor]] = {}
        self.errors: dict[tuple[str, str], Tensor] = {}

    def task(self, name: str) -> OsseTask:
        """Return a task by its name."""
        return next(task for task in self.tasks if task.name == name)

    def keep(self, task: str, method: str, found: Mapping[str, Tensor], count: int) -> None:
        """Keep the tensors of a cycle on ``count`` timelines, of as many networks as there are."""
        self.scores[task, method] = dict(found)
        self.errors[task, method] = settled(dict(found), self.cycles.sd).unflatten(0, (-1, count))

    def method_rows(self, task: str, names: Iterable[str]) -> list[Row]:
        """Return errors, ratios, time and lost timelines of methods on all timelines."""
        names = list(names)
        rows = self.compared(task, {name: self.errors[task, name] for name in names})
        for name in names:
            scores = self.scores[task, name]
            sums = [DepartureSums.from_tensors(scores, f"{kind}.") for kind in DEPARTURES]
            rows += [
                *(
                    Row(name, task, metric, float(scores[metric]))
                    for metric in TIMES
                    if metric in scores
                ),
                Row(name, task, "lost", float(scores["lost"].sum()), n=len(scores["lost"])),
                *departure_rows(name, task, self.labels, sums, self.timelines),
            ]
        return rows

    def compared(self, where: str, errors: Mapping[str, Tensor]) -> list[Row]:
        """Return errors (seeds, timelines, C), and their ratios to interpolation."""
        rows = []
        for name, squared in errors.items():
            draws = Resamples.clusters(range(squared.shape[1]))
            for channel, label in enumerate(self.labels):
                squares = squared[..., channel].double().square().mean(0).numpy()
                rows.append(row_of(name, where, draws, moments(squares, root, f"rmse_{label}")))
            if name != INTERPOLATION and INTERPOLATION in errors:
                rows += ratios(name, where, draws, squared, errors[INTERPOLATION], INTERPOLATION)
        return rows

    def pictures(self) -> dict[str, Tensor]:
        """Return the analysis RMSE of every cycle, ``task|method`` to (T,B,C)."""
        sd, shown = self.cycles.sd, {task.name for task in self.tasks}
        return {
            f"{task}|{name}": torch.where(score["lost"][:, None], sd, score["analysis"]).float()
            for (task, name), score in self.scores.items()
            if task in shown
        }


class TwinScores(CycledScores):
    """Runs classical methods and the networks of a run on every timeline.

    Args:
        cycles: The timelines.
        tasks: The tasks.
        methods: Returns the classical methods of a task.
        load: Returns the trained network of a form and seed.
        seeds: Seeds of the networks.
        forms: Forms of Adas.
        settings: Tuned settings of the classical methods.
    """

    def __init__(
        self,
        cycles: TwinCycles,
        tasks: Sequence[OsseTask],
        methods: Callable[[str], list[Method]],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
    ) -> None:
        super().__init__(cycles, tasks, settings)
        self.methods, self.load = methods, load
        self.seeds, self.forms = tuple(seeds), tuple(forms)

    def works(self) -> list[Work]:
        """Return every method on every task; the networks of a form share a cycle."""
        cycles = self.cycles.cycles
        short = (("first", cycles),) if cycles < self.cycles.world.cycles else ()
        seeds = (*short, ("seeds-", "+".join(map(str, self.seeds))))
        return [
            Work(name, task.name, cycles, seeds if name in self.forms else short)
            for task in self.tasks
            for name in (*(method.name for method in self.methods(task.name)), *self.forms)
        ]

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the tensors of the cycles of a method, or of the networks of all seeds."""
        task, assimilators = self.task(work.task), self._assimilators(work)
        rows = list(range(self.timelines)) * len(assimilators)
        method = assimilators[0] if len(assimilators) == 1 else SideBySide(assimilators)
        return self.cycles.run(task, work.method, method, rows=rows, verify=True, tick=tick)

    def _assimilators(self, work: Work) -> list[Assimilator]:
        if work.method in self.forms:
            return [self.load(work.method, seed) for seed in self.seeds]
        return [built(self.settings, classical(self.methods(work.task), work.method), work.task)]

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep what `compute` returned."""
        self.keep(work.task, work.method, found, self.timelines)

    def rows(self) -> list[Row]:
        """Return every figure of every method, task and channel."""
        return [
            row
            for task in self.tasks
            for row in self.method_rows(
                task.name, [name for place, name in self.scores if place == task.name]
            )
        ]

    def bars(self) -> list[Bar]:
        """Return nothing: a few timelines rank no methods."""
        return []

    def example(self) -> Example:
        """Return the first cycle of the first test timeline at the largest density."""
        world = self.cycles.world
        density = max(task.density for task in self.tasks)
        form = "adas_increment" if "adas_increment" in self.forms else self.forms[0]
        first = next(iter(world.observations("test", density)))
        return Example(
            self.load(form, self.seeds[0]),
            world.first_background("test")[:1],
            GriddedObservations(first.values[:1], first.errors[:1]),
        )


def paired(method: str, task: str, own: Tensor, other: Tensor, versus: str) -> Row:
    """Return the geometric mean over timelines of the ratios of errors (seeds, timelines, C)."""
    return ratios(method, task, Resamples.clusters(range(own.shape[1])), own, other, versus)[0]


def exponential(means: np.ndarray) -> np.ndarray:
    """Return the geometric mean, from the mean of logs (..., 1) as the only moment."""
    return cast(np.ndarray, np.exp(means[..., 0]))


def logs(errors: Tensor) -> Tensor:
    """Return the mean log error (timelines,) of the first channel over networks."""
    return errors[..., 0].double().log().mean(0)


def row_of(method: str, task: str, draws: Resamples, score: Any) -> Row:
    """Return the row of one score, or of that of several networks, with its interval."""
    ((name, interval),) = draws.intervals(score).items()
    return Row(method, task, name, *interval)


def ratios(
    method: str, task: str, draws: Resamples, own: Tensor, other: Tensor, versus: str
) -> list[Row]:
    """Return the geometric mean of the ratios over timelines, and the ratio of the rms.

    The interval of the former resamples networks, too, where they are of several seeds.
    """
    log_ratios = own[..., 0].double().log() - logs(other)
    squares = [errors[..., 0].double().square().mean(0) for errors in (own, other)]
    ratio = row_of(method, task, draws, [moments(ratio.numpy(), None, f"over_{versus}")
                                         for ratio in log_ratios])  # fmt: skip
    rms = moments(torch.stack(squares, 1).numpy(), root_ratio, f"rms_over_{versus}")
    value, low, high = (math.exp(x) for x in (ratio.value, ratio.low, ratio.high))
    return [
        ratio._replace(value=value, low=low, high=high),
        row_of(method, task, draws, rms),
    ]
