"""Experiments of separate cases, one analysis each, and the scores of every method on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.evidence import Resamples, Row, Scores, compare, moments, root, root_ratio
from harness.files import Data
from weather.baselines.assimilator import Assimilator
from weather.cycle import CycleStep
from weather.experiments.experiment import (
    Example,
    Load,
    Score,
    Settings,
    Task,
    TunedExperiment,
    Work,
    built,
    classical,
    expecting,
)
from weather.metrics import Departures, DepartureSums, departure_rows, withheld_points
from weather.observations.gridded import GriddedObservations
from weather.plots import analysis_figure
from weather.progress import Tick, no_tick

REFERENCE = "background"  # what all others are compared with
QUICK_CASES = 3
PICTURED = ("adas_increment", "oi")
SUMS = ("assimilated", "withheld")
DEPARTURE_CASES = 6

CaseT = TypeVar("CaseT")


class Situation(NamedTuple):
    """What a method is given in a case, and the truth.

    Attributes:
        background: (1,M,C,H,W) of a method with M members.
        observations: Fields (1,C,H,W), the same for every method.
        truth: (C,H,W).
    """

    background: Tensor
    observations: GriddedObservations
    truth: Tensor

    def analyze(self, method: Assimilator) -> Tensor:
        """Return the analysis (C,H,W), the mean if the method is an ensemble."""
        return method.analyze(self.background, self.observations)[0].mean(0)


class CaseExperiment(TunedExperiment, Generic[CaseT]):
    """Tasks, methods and tuning on separate cases, see `.experiment.Experiment`.

    Attributes:
        caption: What is said of the case that is drawn.
        title: What is said of the field that is drawn; its label if empty.
    """

    reference = REFERENCE
    base = (REFERENCE,)
    pictures_file = "example.safetensors"
    caption: str
    title = ""

    @abstractmethod
    def cases(self, task: str = "", *, tuning: bool = False) -> list[CaseT]:
        """Return the cases of a task by its name, those for tests or those for tuning."""

    @abstractmethod
    def situation(self, task: Task, case: CaseT, members: int = 1) -> Situation:
        """Return background, observations and truth of a case, with that many members."""

    @abstractmethod
    def tuning_error(self, task: Task, errors: Tensor) -> float:
        """Return the score that tuning minimizes, from mean square errors (N,C) in all cases."""

    def square_errors(
        self, task: Task, cases: Sequence[CaseT], method: Assimilator, tick: Tick = no_tick
    ) -> Tensor:
        """Return the mean square errors (N,C) of the analyses of N cases."""
        squares = []
        for case in cases:
            here = self.situation(task, case, method.members)
            squares.append(self.grid.area_mean((here.analyze(method) - here.truth).square()))
            tick()
        return torch.stack(squares)

    def scorer(self, cycles: int) -> Score:  # noqa: ARG002
        """Return the function that scores a method on the tuning cases; ``cycles`` is not used."""
        return self.tuning_score

    def tuning_score(self, task: Task, name: str, method: Assimilator) -> float:  # noqa: ARG002
        """Return the score that tuning minimizes, over the tuning cases."""
        cases = self.cases(task.name, tuning=True)
        return self.tuning_error(task, self.square_errors(task, cases, method))

    def digest(self) -> list[Data]:
        """Return the data: their content decides what is trained and scored."""
        return self.data()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return a map panel of the main field for each method, with its caption."""
        channel = self.channels.labels.index(self.field)
        variable, level = list(self.channels)[channel]
        return [
            (
                f"{method}, {self.caption}",
                analysis_figure(
                    pictures["truth"][channel],
                    pictures["background"][channel],
                    pictures[method][channel],
                    self.grid,
                    variable=variable,
                    level=level,
                    observed=pictures["observed"].bool(),
                    title=f"{method}: {self.title or self.field}",
                ),
            )
            for method in PICTURED
            if method in pictures
        ]


class CaseScores(ABC, Generic[CaseT]):
    """Score every method on every case of every task.

    Args:
        source: The cases.
        tasks: The tasks.
        load: Returns the trained network of a form and seed.
        seeds: Seeds of the networks.
        forms: Forms of Adas.
        settings: Tuned settings of the classical methods.
        chosen: Cases of a task that are scored, all by default.

    Attributes:
        others: What is scored next to classical methods and networks.
        withheld: Key of the points that are withheld for departures.
        gap: Cases between two whose departures are taken, at least.
    """

    others: tuple[str, ...] = ()
    withheld: int
    gap = 1

    def __init__(
        self,
        source: Any,
        tasks: Sequence[Task],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        chosen: slice = slice(None),
    ) -> None:
        self.source: CaseExperiment[CaseT] = source
        self.tasks, self.load, self.settings, self.chosen = list(tasks), load, settings, chosen
        self.seeds, self.forms = tuple(seeds), tuple(forms)
        self.errors: dict[tuple[str, str], Tensor] = {}
        self.departures: dict[tuple[str, str], tuple[DepartureSums | None, ...]] = {}

    def cases(self, task: str) -> list[CaseT]:
        """Return the cases of a task that are scored."""
        return self.source.cases(task)[self.chosen]

    @abstractmethod
    def scope(self, task: str) -> tuple[tuple[str, str | int], ...]:
        """Return name and value of what identifies the cases of a task among results."""

    @abstractmethod
    def draws(self, task: str) -> Resamples:
        """Return resamples of the independent units of a task."""

    @abstractmethod
    def score(self, own: Tensor, base: Tensor) -> Scores:
        """Return the scores of mean square errors (N,C), and of those of the background."""

    def channel_scores(self, own: Tensor, base: Tensor) -> tuple[list[Scores], list[Scores]]:
        """Return the RMSE of every channel, and its ratio to that of another method."""
        labels, pairs = self.source.channels.labels, torch.stack((own, base), -1).unbind(1)
        named = list(zip(labels, pairs, strict=True))
        errors = [moments(pair[:, 0], root, f"rmse_{label}") for label, pair in named]
        return errors, [moments(pair, root_ratio, f"ratio_{label}") for label, pair in named]

    def works(self) -> list[Work]:
        """Return every method on every task; the networks of a form are scored together."""
        works = []
        for task in self.tasks:
            count, scope = len(self.cases(task.name)), self.scope(task.name)
            seeds = (*scope, ("seeds-", "+".join(map(str, self.seeds))))
            names = [method.name for method in self.source.methods(task.name)]
            works += [Work(name, task.name, count, scope) for name in (*names, *self.others)]
            works += [Work(f, task.name, count * len(self.seeds), seeds) for f in self.forms]
        return works

    def members(self, name: str, task: str) -> list[Assimilator]:
        """Return a classical method, or the networks of a form."""
        if name not in self.forms:
            return [built(self.settings, classical(self.source.methods(task), name), task)]
        sd = self.source.background_error(task)
        return [expecting(self.load(name, seed), sd) for seed in self.seeds]

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return errors (seeds,N,C) of a method on a task, and departures of its first network."""
        task = next(task for task in self.tasks if task.name == work.task)
        cases, members = self.cases(work.task), self.members(work.method, work.task)
        errors = [self.source.square_errors(task, cases, member, tick) for member in members]
        tensors, method = {"errors": torch.stack(errors)}, members[0]
        departures = Departures(withheld_points(self.source.grid, self.withheld)[None])
        for case in cases[:: max(self.gap, len(cases) // DEPARTURE_CASES)]:
            background, observations, _ = self.source.situation(task, case, method.members)
            analysis = method.analyze(background, observations)
            departures.add(CycleStep(background, analysis, observations), method)
        for name in SUMS:
            tensors |= getattr(departures, name).tensors(f"{name}.")
        return tensors

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep what `compute` returned."""
        key = work.task, work.method
        self.errors[key] = found["errors"]
        self.departures[key] = tuple(DepartureSums.from_tensors(found, f"{name}.") for name in SUMS)

    def rows(self) -> list[Row]:
        """Return errors, ratios to the background, paired differences from it, and departures."""
        return [row for task in self.tasks for row in self.task_rows(task.name)]

    def task_rows(self, task: str) -> list[Row]:
        """Return the rows of a task."""
        rows = self.compared(task)
        for method in self.task_errors(task):
            labels = self.source.channels.labels
            rows += departure_rows(method, task, labels, self.departures[task, method])
        return rows

    def task_errors(self, task: str) -> dict[str, Tensor]:
        """Return the errors (seeds,N,C) on a task, by method."""
        return {method: scored for (name, method), scored in self.errors.items() if name == task}

    def compared(self, task: str) -> list[Row]:
        """Return the scores on a task, and what methods differ by from the background."""
        errors = self.task_errors(task)
        scores = {
            method: [self.score(square, errors[REFERENCE][0]) for square in squares]
            for method, squares in errors.items()
        }
        return [
            row
            for row in compare(scores, self.draws(task), task=task, reference=REFERENCE)
            if not row.versus or row.metric == "ratio" or row.metric.startswith("rmse")
        ]

    def pictured(self) -> tuple[Task, CaseT]:
        """Return the first task of the largest density, and its last case."""
        task = max(self.tasks, key=lambda task: task.density)
        return task, self.cases(task.name)[-1]

    def pictures(self) -> dict[str, Tensor]:
        """Return the fields of one case, and its analyses by optimal interpolation and by Adas."""
        task, case = self.pictured()
        here = self.source.situation(task, case)
        choices = (*self.forms, *(method.name for method in self.source.methods(task.name)))
        return {
            "truth": here.truth,
            "background": here.background[0, 0],
            "observed": here.observations.mask[0].any(0).float(),
            **{
                name: here.analyze(self.members(name, task.name)[0])
                for name in PICTURED
                if name in choices
            },
        }

    def example(self) -> Example:
        """Return the same case, analyzed by the increment form if it is scored."""
        task, case = self.pictured()
        here = self.source.situation(task, case)
        form = PICTURED[0] if PICTURED[0] in self.forms else self.forms[0]
        sd = self.source.background_error(task.name)
        return Example(self.load(form, self.seeds[0]), here.background, here.observations, sd)
