"""Score every method in a twin world."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, compare, moments, root
from harness.evidence import Scores as EvidenceScores
from weather.baselines.assimilator import Assimilator, SideBySide
from weather.experiments.experiment import (
    Example,
    Load,
    Settings,
    Work,
    built,
    classical,
)
from weather.experiments.twin.twin_tasks import (
    CycleScores,
    TwinEvaluation,
    TwinTask,
    settled_squares,
)
from weather.metrics import departure_rows, joined, trend
from weather.observations.gridded import GriddedObservations
from weather.progress import Tick, no_tick

UNGUIDED = ("free_run", "persistence", "climatology")  # see no observations, cannot be lost
REFERENCE = "oi"  # what all others are compared with
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
        self._take(self.evaluation.task(work.task), work.method, CycleScores.from_tensors(found))

    def cycle(self, task: TwinTask, name: str, tick: Tick = no_tick) -> CycleScores:
        """Return the scores of a method, or of the networks of all seeds on all timelines."""
        count = len(self.seeds)
        timelines, guard = [*range(count)], name not in UNGUIDED
        assimilator: Assimilator
        if name in self.forms:
            assimilator = SideBySide([self.load(name, seed) for seed in self.seeds])
            timelines = timelines * count
        else:
            assimilator = built(
                self.settings, classical(self.evaluation.classical(), name), task.name
            )
        return self.evaluation.run(
            task, assimilator, guard=guard, verify=True, timelines=timelines or None, tick=tick
        )

    def _take(self, task: TwinTask, name: str, scores: CycleScores) -> None:
        """Keep scores; those of a form pair every network with the timeline of its seed."""
        error = self.evaluation.error(task, scores)
        if name in self.forms:
            count = len(self.seeds)
            own = torch.arange(count)
            scores, error = (
                scores.rows(own * (count + 1)),
                error.unflatten(0, (count, count))[own, own],
            )
        self.scores[task.name, name], self.errors[task.name, name] = scores, error

    def rows(self) -> list[Row]:
        """Return every figure of every method, task and channel.

        ``rmse``: median over seeds, the blocks of all seeds drawn together for the interval, then
        the differences from optimal interpolation, whose p is at least that of a sign test over
        the timelines. ``rmse_..._seed0`` and so on: every seed with its own interval, first
        channel. ``lost``: timelines that left the truth. ``drift``: median over seeds of the trend
        of the error within the last half, over its mean, without sign; ``drift_..._seed0`` and so
        on: that of every seed, with its sign. The others are departures from the observations,
        those of a form over all timelines, see :func:`weather.metrics.figures`.
        """
        rows = []
        for task in dict.fromkeys(task for task, _ in self.errors):
            rows += self._compared(task)
            for name, method in self.errors:
                if name == task:
                    rows += self._seed_rows(task, method)
                    scores = self.scores[task, method]
                    rows += departure_rows(
                        method, task, self.labels, (scores.assimilated, scores.withheld),
                        n=int((~scores.lost).sum()),
                    )  # fmt: skip
        return rows

    def _compared(self, task: str) -> list[Row]:
        """Return the RMSE of every method on a task, and the differences from the reference."""
        squares = {
            method: self._settled_squares(task, method)
            for name, method in self.errors
            if name == task
        }
        length, count, _ = next(iter(squares.values())).shape
        scores = {method: _median_rmse(found, self.labels) for method, found in squares.items()}
        found = compare(
            scores,
            block_resamples(length),
            task=task,
            reference=REFERENCE if REFERENCE in scores else None,
        )
        medians = {
            (method, f"rmse_{label}"): statistics.median(self.errors[task, method][:, c].tolist())
            for method in scores
            for c, label in enumerate(self.labels)
        }
        return [
            row._replace(n=row.n * count, p=max(row.p, 2.0 ** (1 - count)))
            if row.versus
            else row._replace(n=row.n * count, value=medians[row.method, row.metric])
            for row in found
        ]

    def _seed_rows(self, task: str, method: str) -> list[Row]:
        """Return the error and the trend of every seed in the first channel."""
        label, scores = self.labels[0], self.scores[task, method]
        each = self._seeds(task, method)
        squares = self._settled_squares(task, method)[:, :, 0]
        draws = block_resamples(len(squares))
        rows = []
        for seed, value in enumerate(each):
            found = draws.intervals(moments(squares[:, seed], root))["value"]
            name = f"rmse_{label}_seed{seed}"
            rows.append(Row(method, task, name, value, found.low, found.high, found.units))
        rows.append(Row(method, task, "lost", float(scores.lost.sum()), n=len(each)))
        slopes = trend(scores.analysis[:, :, 0])
        rows.append(Row(method, task, "drift", float(slopes.abs().quantile(0.5)), n=len(each)))
        return rows + [
            Row(method, task, f"drift_{label}_seed{seed}", value)
            for seed, value in enumerate(slopes.tolist())
        ]

    def _settled_squares(self, task: str, method: str) -> Tensor:
        """Return the square errors (T,B,C) after the first third; lost timelines ran freely."""
        scores = self.scores[task, method]
        return settled_squares(
            scores, self.scores[task, "free_run"] if bool(scores.lost.any()) else None
        )

    def bars(self) -> list[Bar]:
        """Return nothing: a few timelines rank no methods."""
        return []

    def _seeds(self, task: str, method: str) -> list[float]:
        return [float(value) for value in self.errors[task, method][:, 0]]

    def pictures(self) -> dict[str, Tensor]:
        """Return the analysis RMSE of every cycle, ``task|method`` to (T,B,C).

        Lost timelines have that of the free run, as in the scores.
        """
        found = {}
        for (task, method), cycles in self.scores.items():
            error = cycles.analysis
            if bool(cycles.lost.any()):
                error = torch.where(
                    cycles.lost[:, None], self.scores[task, "free_run"].analysis, error
                )
            found[f"{task}|{method}"] = error.float()
        return found

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


def block_resamples(length: int) -> Resamples:
    """Return resamples of a series in blocks; of a series too short for two, without intervals."""
    if length < 2 * BLOCK:
        return Resamples.clusters([0] * length)
    return Resamples.blocks(length, BLOCK)


def _median_rmse(squares: Tensor, labels: Sequence[str]) -> EvidenceScores:
    """Return the median over B series of the RMSE, for every channel of squares (T,B,C)."""
    return joined(
        moments(squares[:, :, channel], _median_root, f"rmse_{label}")
        for channel, label in enumerate(labels)
    )


def _median_root(means: np.ndarray) -> np.ndarray:
    """Return the median over the last dimension of the roots of mean squares."""
    return np.median(np.sqrt(means), axis=-1)
