"""Score every method in a twin world."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, moments
from weather.baselines.assimilator import Assimilator
from weather.baselines.side_by_side import SideBySide
from weather.experiments.departures import figures
from weather.experiments.experiment import Example, Load, Work, classical
from weather.experiments.method import Settings, built
from weather.experiments.twin.cycle_scores import CycleScores
from weather.experiments.twin.evaluation import TwinEvaluation, TwinTask
from weather.metrics import drift, trend
from weather.observations.gridded import GriddedObservations
from weather.progress import Tick, no_tick

UNGUIDED = ("free_run", "persistence", "climatology")  # see no observations, cannot be lost
BLOCK = 20  # cycles of one block of the bootstrap, five days


class TwinScores:
    """Run every method on every task and turn the cycles into rows and bars.

    Args:
        evaluation: The experiment.
        load: Returns the trained network of a form and seed.
        seeds: Test timelines and networks, one of each a seed.
        forms: Forms of Adas.
        settings: Tuned settings of the classical methods.
    """

    def __init__(
        self,
        evaluation: TwinEvaluation,
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
    ) -> None:
        self.evaluation, self.load, self.settings = evaluation, load, settings
        self.seeds, self.forms = tuple(seeds), tuple(forms)
        self.channels = evaluation.world.channels
        self.labels = self.channels.labels
        self.scores: dict[tuple[str, str], CycleScores] = {}
        self.errors: dict[tuple[str, str], Tensor] = {}
        self.crossed: dict[tuple[str, str], Tensor] = {}

    def works(self) -> list[Work]:
        """Return every method on every task; the networks of a form share a cycle."""
        cycles, count = self.evaluation.cycles, len(self.seeds)
        short = (("first", cycles),) if cycles < self.evaluation.world.cycles else ()
        timelines = short + ((("timelines", count),) if count else ())
        seeds = (*short, ("seeds-", "+".join(map(str, self.seeds))))
        names = [method.name for method in self.evaluation.classical()]
        return [
            Work(name, task.name, cycles * count, seeds)
            if name in self.forms
            else Work(name, task.name, cycles, timelines)
            for task in self.evaluation.tasks
            for name in (*names, *self.forms)
        ]

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the errors of a method, or of the networks of all seeds on all timelines."""
        every = work.ticks // self.evaluation.cycles
        ticks = tick if every == 1 else partial(_tick_often, tick, every)
        return self.cycle(self.evaluation.task(work.task), work.method, ticks).tensors()

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep what :meth:`compute` returned."""
        task = self.evaluation.task(work.task)
        self._take(task, work.method, CycleScores.from_tensors(found))

    def cycle(self, task: TwinTask, name: str, tick: Tick = no_tick) -> CycleScores:
        """Return the scores of a method, or of the networks of all seeds on all timelines."""
        count = len(self.seeds)
        timelines, guard = [*range(count)], name not in UNGUIDED
        assimilator: Assimilator
        if name in self.forms:
            assimilator = SideBySide([self.load(name, seed) for seed in self.seeds])
            timelines = timelines * count
        else:
            method = classical(self.evaluation.classical(), name)
            assimilator = built(self.settings, method, task.name)
        return self.evaluation.run(
            task, assimilator, guard=guard, verify=True, timelines=timelines or None, tick=tick
        )

    def _take(self, task: TwinTask, name: str, scores: CycleScores) -> None:
        """Keep scores; those of a form are of every network on the timeline of its own seed.

        ``crossed`` keeps the errors (seeds, timelines, C) of all networks on all timelines.
        """
        error = self.evaluation.error(task, scores)
        if name in self.forms:
            count = len(self.seeds)
            error = self.crossed[task.name, name] = error.unflatten(0, (count, count))
            own = torch.arange(count)
            scores, error = scores.rows(own * (count + 1)), error[own, own]
        self.scores[task.name, name], self.errors[task.name, name] = scores, error

    def rows(self) -> list[Row]:
        """Return every figure of every method, task and channel.

        ``rmse``: median over seeds, the blocks of all seeds drawn together for the interval.
        ``rmse_..._seed0`` and so on: every seed with its own interval, first channel. ``lost``:
        timelines that left the truth. ``drift``: median over seeds of the trend of the error within
        the last half, over its mean, without sign; ``drift_..._seed0`` and so on: that of every
        seed, with its sign. The others are departures from the observations, those of a
        form over all timelines, see :func:`weather.experiments.departures.figures`.
        """
        rows = []
        for (task, method), error in self.errors.items():
            for channel, label in enumerate(self.labels):
                each = error[:, channel].tolist()
                squares = self._settled_squares(task, method)[:, :, channel]
                bounds = _interval(squares)
                rows.append(Row(method, task, f"rmse_{label}", statistics.median(each), *bounds))
            squares = self._settled_squares(task, method)[:, :, 0]
            each = error[:, 0].tolist()
            rows += [
                Row(method, task, f"rmse_{self.labels[0]}_seed{row}", value, *bounds)
                for row, value in enumerate(each)
                for bounds in [_interval(squares[:, row : row + 1])]
            ]
            scores = self.scores[task, method]
            rows.append(Row(method, task, "lost", float(scores.lost.sum()), n=len(each)))
            slopes = trend(scores.analysis[:, :, 0])
            rows.append(Row(method, task, "drift", float(slopes.abs().median()), n=len(each)))
            rows += [
                Row(method, task, f"drift_{self.labels[0]}_seed{row}", value)
                for row, value in enumerate(slopes.tolist())
            ]
            kept = int((~scores.lost).sum())
            for stem, values in figures(scores.assimilated, scores.withheld).items():
                rows += [
                    Row(method, task, f"{stem}_{label}", value, n=kept)
                    for label, value in zip(self.labels, values, strict=True)
                ]
        return rows

    def _settled_squares(self, task: str, method: str) -> Tensor:
        """Return the square errors (T,B,C) after the first third; lost timelines ran freely."""
        scores = self.scores[task, method]
        own = scores.analysis[len(scores.analysis) // 3 :].square()
        if not bool(scores.lost.any()):
            return own
        free = self.scores[task, "free_run"].analysis[-len(own) :, : own.shape[1]].square()
        return torch.where(scores.lost[:, None], free, own)

    def bars(self) -> list[Bar]:
        """Return what the better form of Adas must reach, met or missed."""
        bars = []
        densities = sorted({task.density for task in self.evaluation.tasks})
        sparse = densities[0]
        for model in ("perfect", "error"):
            task = f"{sparse:.3g}/{model}"
            better = min(("adas_increment", "adas_official"), key=lambda m: self._median(task, m))
            ratio = self._median(task, better) / self._median(task, "oi")
            bars.append(Bar(f"{better} over oi, rmse_{self.labels[0]}, {task}", ratio, "<=", 0.85))
            slope = drift(self.scores[task, better].analysis[:, :, 0]).median()
            bars.append(Bar(f"drift of {better}, {task}", float(slope), "<=", 0.1))
        return bars

    def _seeds(self, task: str, method: str) -> list[float]:
        return [float(value) for value in self.errors[task, method][:, 0]]

    def _median(self, task: str, method: str) -> float:
        return statistics.median(self._seeds(task, method))

    def pictures(self) -> dict[str, Tensor]:
        """Return the analysis RMSE of every cycle, ``task|method`` to (T,B,C)."""
        return {
            f"{task}|{method}": cycles.analysis.float()
            for (task, method), cycles in self.scores.items()
        }

    def example(self) -> Example:
        """Return the first cycle of the first test timeline at the largest density."""
        world = self.evaluation.world
        density = max(task.density for task in self.evaluation.tasks)
        form = "adas_increment" if "adas_increment" in self.forms else self.forms[0]
        first = next(iter(world.observations("test", density)))
        return Example(
            self.load(form, self.seeds[0]),
            world.first_background("test")[:1],
            GriddedObservations(first.values[:1], first.errors[:1]),
        )


def _tick_often(tick: Tick, times: int) -> None:
    for _ in range(times):
        tick()


def _median_root(means: np.ndarray) -> np.ndarray:
    """Return the median over the last dimension of the roots of mean squares."""
    return np.median(np.sqrt(means), axis=-1)


def _interval(squares: Tensor) -> tuple[float, float, int]:
    """Return low, high and the number of blocks of a series (T,B); NaN where it is too short."""
    if len(squares) < 2 * BLOCK:
        return math.nan, math.nan, squares.shape[1]
    draws = Resamples.blocks(len(squares), BLOCK)
    found = draws.intervals(moments(squares, _median_root))["value"]
    return found.low, found.high, found.units * squares.shape[1]
