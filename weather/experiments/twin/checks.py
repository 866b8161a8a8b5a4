"""Checks of a twin experiment beyond its scores: crossed seeds, redrawn networks, bad reports."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, compare, moments, root
from weather.baselines.assimilator import Assimilator
from weather.baselines.side_by_side import SideBySide
from weather.experiments.experiment import Work, classical
from weather.experiments.method import built
from weather.experiments.twin.corruption import Corruption, corrupt_half
from weather.experiments.twin.cycle_scores import CycleScores
from weather.experiments.twin.evaluation import TwinEvaluation, TwinTask
from weather.experiments.twin.scores import TwinScores
from weather.progress import Tick, no_tick

FORM, CONTROL = "adas_increment", "ungated"
REDRAWN, CORRUPTED = "redrawn", "corrupted"
CORRUPTION_CYCLES = 90
DECLARED, DENIED = 1.05, 1.10


class TwinChecks:
    """Three checks of the increment form.

    Crossed: the network of every seed on the timelines of all seeds, next to the ungated control,
    at the smallest density. Timelines differ more than networks do, so only networks that have
    seen the same ones show whether the gate matters beyond the spread of the seeds.
    Redrawn: the observing network changes in every cycle, at the smallest density.
    Corrupted: half of the reports get five times their errors, at the largest density in the
    perfect model; see :func:`weather.experiments.twin.corruption.corrupt_half`.

    Args:
        scores: The experiment, whose work was taken before.
    """

    def __init__(self, scores: TwinScores) -> None:
        self.scores, self.evaluation = scores, scores.evaluation
        self.found: list[Row] = []
        self.corruption: dict[str, Corruption] = {}

    @cached_property
    def crossed(self) -> dict[tuple[str, str], list[float]]:
        """Root of the mean square over the timelines for every seed, first channel."""
        return {
            (task.name, form): self._squares(task.name, form).mean(1).sqrt().tolist()
            for task in self._sparse()
            for form in (FORM, CONTROL)
        }

    def _squares(self, task: str, form: str) -> Tensor:
        """Return the mean square errors (seeds, timelines) of the first channel."""
        return self.scores.crossed[task, form][..., 0].square()

    def works(self) -> list[Work]:
        """Return what is redrawn and what is corrupted."""
        names = ("oi", FORM) if FORM in self.scores.forms else ("oi",)
        count, cycles = len(self.scores.seeds), self.evaluation.cycles
        short, seeds = self._short(), "+".join(map(str, self.scores.seeds))
        own: dict[str, tuple[tuple[str, str | int], ...]]
        own = {FORM: (("seeds-", seeds),), "oi": (("timelines", count),)}
        redrawn = [
            Work(name, task.name, cycles, (("part-", REDRAWN), *own[name]))
            for name in names[::-1]
            for task in self._sparse()
        ]
        corrupted = [
            Work(
                name,
                short.tasks[0].name,
                short.cycles * (count if name == FORM else 1),
                (("part-", CORRUPTED), *(own[FORM] if name == FORM else ())),
            )
            for name in names
        ]
        return redrawn + corrupted

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the cycles with redrawn networks, or the ratios (seeds, 3) of a corruption."""
        task = self.evaluation.task(work.task)
        if ("part-", REDRAWN) in work.scope:
            return self._redraw(task, work.method, tick).tensors()
        short = self._short()
        found = [
            corrupt_half(short.tasks[0], short, member, tick=tick)
            for member in self._methods(task, work.method)
        ]
        return {CORRUPTED: torch.tensor(found, dtype=torch.float64)}

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep the rows of what :meth:`compute` returned."""
        task = self.evaluation.task(work.task)
        if CORRUPTED in found:
            each = [Corruption(*one) for one in found[CORRUPTED].tolist()]
            self._corrupted(task, work.method, each)
        else:
            self._redrawn(task, work.method, CycleScores.from_tensors(found))

    def rows(self) -> list[Row]:
        """Return every figure of the checks, and on crossed seeds the gain over the control."""
        label = self.scores.labels[0]
        crossed = [
            Row(form, f"{task}/crossed", f"rmse_{label}_seed{row}", value, n=len(errors))
            for (task, form), errors in self.crossed.items()
            for row, value in enumerate(errors)
        ]
        for task in dict.fromkeys(task for task, _ in self.crossed):
            scores = {
                form: [moments(seed, root, f"rmse_{label}") for seed in self._squares(task, form)]
                for form in (FORM, CONTROL)
            }
            timelines = Resamples.clusters(range(len(self.scores.seeds)))
            crossed += compare(scores, timelines, task=f"{task}/crossed", reference=CONTROL)
        return sorted(self.found + crossed, key=lambda row: (row.task, row.method, row.metric))

    def bars(self) -> list[Bar]:
        """Return what the corruption must do, and must not do, to Adas."""
        found = self.corruption[FORM]
        return [
            *(
                Bar(
                    f"worst gated over best ungated seed, rmse_{self.scores.labels[0]}, {task}",
                    max(self.crossed[task, FORM]) / min(self.crossed[task, CONTROL]),
                    "<=",
                    1.0,
                )
                for task in dict.fromkeys(task for task, _ in self.crossed)
            ),
            Bar(f"{FORM}, corrupted half declared over withheld", found.declared, "<=", DECLARED),
            Bar(f"{FORM}, corrupted half denied over withheld", found.denied, ">=", DENIED),
            Bar(f"{FORM}, corrupted half forced over withheld", found.forced, ">=", DENIED),
        ]

    def _methods(self, task: TwinTask, name: str) -> list[Assimilator]:
        """Return OI, or the networks of all seeds."""
        if name == FORM:
            return [self.scores.load(FORM, seed) for seed in self.scores.seeds]
        oi = classical(self.evaluation.classical(), "oi")
        return [built(self.scores.settings, oi, task.name)]

    def _sparse(self) -> list[TwinTask]:
        """Return the tasks at the smallest density."""
        least = min(task.density for task in self.evaluation.tasks)
        return [task for task in self.evaluation.tasks if task.density == least]

    def _short(self) -> TwinEvaluation:
        """Return the evaluation of corrupted reports, at the largest density."""
        dense = max(task.density for task in self.evaluation.tasks)
        cycles = min(CORRUPTION_CYCLES, self.evaluation.cycles)
        return TwinEvaluation(self.evaluation.world, (dense,), cycles)

    def _redraw(self, task: TwinTask, name: str, tick: Tick) -> CycleScores:
        members, count = self._methods(task, name), len(self.scores.seeds)
        method = members[0] if len(members) == 1 else SideBySide(members)
        return self.evaluation.run(task, method, redraw=True, timelines=range(count), tick=tick)

    def _redrawn(self, task: TwinTask, name: str, scored: CycleScores) -> None:
        count = len(self.scores.seeds)
        median = self.evaluation.error(task, scored).quantile(0.5, dim=0).tolist()
        place = f"{task.name}/redrawn"
        self.found += [
            Row(name, place, f"rmse_{label}", value, n=count)
            for label, value in zip(self.scores.labels, median, strict=True)
        ]
        self.found.append(Row(name, place, "lost", float(scored.lost.sum()), n=count))

    def _corrupted(self, task: TwinTask, name: str, each: list[Corruption]) -> None:
        found = Corruption(*(statistics.median(column) for column in zip(*each, strict=True)))
        self.corruption[name] = found
        self.found += [
            Row(name, f"{task.name}/corrupted", f"{key}_over_withheld", value, n=len(each))
            for key, value in found._asdict().items()
        ]
