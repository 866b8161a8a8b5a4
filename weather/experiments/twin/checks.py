"""Checks of a twin experiment beyond its scores: crossed seeds, redrawn networks, bad reports."""

from __future__ import annotations

import statistics

from harness.evidence import Bar, Row
from weather.baselines.assimilator import Assimilator
from weather.baselines.side_by_side import SideBySide
from weather.experiments.experiment import classical
from weather.experiments.method import built
from weather.experiments.twin.corruption import Corruption, corrupt_half
from weather.experiments.twin.cycle_scores import CycleScores
from weather.experiments.twin.evaluation import TwinEvaluation, TwinTask
from weather.experiments.twin.scores import TwinScores
from weather.progress import Each, Progress, Tick, in_turn, no_tick, silent

FORM, CONTROL = "adas_increment", "ungated"
CORRUPTION_CYCLES = 90
DECLARED, DENIED = 1.05, 1.10


class TwinChecks:
    """Three checks of the increment form.

    Crossed: the network of every seed on the timelines of all seeds, next to the ungated control,
    at the smallest density. Timelines differ more than networks do, so only networks that have
    seen the same ones tell whether the gate matters beyond the spread of the seeds.
    Redrawn: the observing network is another one in every cycle, at the smallest density.
    Corrupted: half of the reports get five times their errors, at the largest density in the
    perfect model; see :func:`weather.experiments.twin.corruption.corrupt_half`.

    Args:
        scores: The experiment, run before.
    """

    def __init__(self, scores: TwinScores) -> None:
        self.scores, self.evaluation = scores, scores.evaluation
        self.found: list[Row] = []
        self.corruption: dict[str, Corruption] = {}
        self.crossed: dict[tuple[str, str], list[float]] = {}

    def run(self, each: Each = in_turn, progress: Progress = silent) -> None:
        """Run all checks.

        Args:
            each: Does one job after the other, or on all cores.
            progress: Tells how far it is.
        """
        tasks, cycles = self.evaluation.tasks, self.evaluation.cycles
        sparse = [task for task in tasks if task.density == min(t.density for t in tasks)]
        dense = TwinTask(max(task.density for task in tasks), "perfect")
        names = ("oi", FORM) if FORM in self.scores.forms else ("oi",)
        short = TwinEvaluation(
            self.evaluation.world, (dense.density,), min(CORRUPTION_CYCLES, cycles)
        )
        redrawn = [(task, name) for name in names[::-1] for task in sparse]
        with progress("redrawing networks", cycles * len(redrawn)) as tick:
            for key, scores in zip(redrawn, each(self._redraw, redrawn, tick), strict=True):
                self._redrawn(*key, scores)
        corrupted = [(dense, short, name) for name in names]
        total = short.cycles * (1 + len(self.scores.seeds) * (len(names) - 1))
        with progress("corrupting reports", total) as tick:
            for (*_, name), found in zip(
                corrupted, each(self._corrupt, corrupted, tick), strict=True
            ):
                self._corrupted(dense, name, found)
        for task in sparse:
            self._crossed(task)

    def rows(self) -> list[Row]:
        """Return every figure of the checks."""
        return sorted(self.found, key=lambda row: (row.task, row.method, row.metric))

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

    def _crossed(self, task: TwinTask) -> None:
        """Take the root of the mean square over the timelines for every seed, first channel."""
        label = self.scores.labels[0]
        for form in (FORM, CONTROL):
            squares = self.scores.crossed[task.name, form][..., 0].square()
            errors = squares.mean(1).sqrt().tolist()
            self.crossed[task.name, form] = errors
            self.found += [
                Row(form, f"{task.name}/crossed", f"rmse_{label}_seed{row}", value, n=len(errors))
                for row, value in enumerate(errors)
            ]

    def _redraw(self, task: TwinTask, name: str, tick: Tick = no_tick) -> CycleScores:
        members, count = self._methods(task, name), len(self.scores.seeds)
        method = members[0] if len(members) == 1 else SideBySide(members)
        return self.evaluation.run(task, method, redraw=True, timelines=range(count), tick=tick)

    def _redrawn(self, task: TwinTask, name: str, scored: CycleScores) -> None:
        count = len(self.scores.seeds)
        median = self.evaluation.error(task, scored).median(0).values.tolist()
        place = f"{task.name}/redrawn"
        self.found += [
            Row(name, place, f"rmse_{label}", value, n=count)
            for label, value in zip(self.scores.labels, median, strict=True)
        ]
        self.found.append(Row(name, place, "lost", float(scored.lost.sum()), n=count))

    def _corrupt(
        self, task: TwinTask, short: TwinEvaluation, name: str, tick: Tick = no_tick
    ) -> list[Corruption]:
        members = self._methods(task, name)
        return [corrupt_half(task, short, member, tick=tick) for member in members]

    def _corrupted(self, task: TwinTask, name: str, each: list[Corruption]) -> None:
        found = Corruption(*(statistics.median(column) for column in zip(*each, strict=True)))
        self.corruption[name] = found
        self.found += [
            Row(name, f"{task.name}/corrupted", f"{key}_over_withheld", value, n=len(each))
            for key, value in found._asdict().items()
        ]
