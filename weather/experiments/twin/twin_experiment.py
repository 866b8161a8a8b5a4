"""A twin world as an experiment, with checks beyond its scores.

Seeds are crossed, networks redrawn, and reports corrupted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, compare, moments, root
from harness.files import Data
from weather.baselines.assimilator import Assimilator, SideBySide
from weather.cycle import Cycle, diverged
from weather.experiments.experiment import (
    DENSITIES,
    OPTIMIZER_BOX,
    Checks,
    Fit,
    Load,
    Method,
    Setting,
    Settings,
    Trial,
    Work,
    built,
    choice_name,
    classical,
    shown,
)
from weather.experiments.twin.twin_scores import REFERENCE, TwinScores
from weather.experiments.twin.twin_tasks import (
    CycleScores,
    TwinEvaluation,
    TwinMethods,
    TwinTask,
    twin_tasks,
)
from weather.experiments.twin.world import Period, TwinWorld
from weather.models.adas.presets import COMPARED
from weather.observations.gridded import GriddedObservations
from weather.plots import cycle_figure, field_label, unit_label
from weather.progress import Progress, Tick, no_tick, silent
from weather.training.stream import generator

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
    steps = Cycle(evaluation.forecast(task), assimilator, world.hours).run(
        first, (observations for _, observations in clean)
    )
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
    hit = (torch.rand(truth[:, :1].shape, generator=draw) < 0.5) & observations.mask
    nominal = torch.where(hit, observations.errors, 0)
    values = torch.where(
        hit,
        truth + FACTOR * nominal * torch.randn(truth.shape, generator=draw),
        observations.values,
    )
    stated = (
        torch.where(hit, factor * observations.errors, observations.errors)
        for factor in (FACTOR, 1.0, CERTAIN)
    )
    return observations.withhold(~hit), *(GriddedObservations(values, errors) for errors in stated)


FORM, CONTROL = "adas_increment", "ungated"
REDRAWN, CORRUPTED_TASKS = "redrawn", "corrupted"
CORRUPTION_CYCLES = 90
DECLARED, DENIED = 1.05, 1.10


class TwinChecks:
    """Three checks of the increment form.

    Crossed: the network of every seed on the timelines of all seeds, next to the ungated control,
    at the smallest density. Timelines differ more than networks do, so only networks that have
    seen the same ones show whether the gate matters beyond the spread of the seeds.
    Redrawn: the observing network changes in every cycle, at the smallest density.
    Corrupted: half of the reports get five times their errors, at the largest density in the
    perfect model; see :func:`weather.experiments.twin.twin_experiment.corrupt_half`.

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
                (("part-", CORRUPTED_TASKS), *(own[FORM] if name == FORM else ())),
            )
            for name in names
        ]
        return redrawn + corrupted

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the cycles with redrawn networks, or the ratios (seeds, 3) of a corruption."""
        task = self.evaluation.task(work.task)
        members, short = self._methods(task, work.method), self._short()
        if ("part-", REDRAWN) in work.scope:
            method = members[0] if len(members) == 1 else SideBySide(members)
            return self.evaluation.run(
                task, method, redraw=True, timelines=range(len(self.scores.seeds)), tick=tick
            ).tensors()
        found = [corrupt_half(short.tasks[0], short, member, tick=tick) for member in members]
        return {CORRUPTED_TASKS: torch.tensor(found, dtype=torch.float64)}

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep the rows of what :meth:`compute` returned."""
        task = self.evaluation.task(work.task)
        if CORRUPTED_TASKS in found:
            each = found[CORRUPTED_TASKS].tolist()
            medians = Corruption(*(statistics.median(one) for one in zip(*each, strict=True)))
            self.corruption[work.method] = medians
            self.found += [
                Row(
                    work.method, f"{task.name}/corrupted", f"{key}_over_withheld", value,
                    n=len(each),
                )
                for key, value in medians._asdict().items()
            ]  # fmt: skip
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
        return [
            built(self.scores.settings, classical(self.evaluation.classical(), "oi"), task.name)
        ]

    def _sparse(self) -> list[TwinTask]:
        """Return the tasks at the smallest density."""
        least = min(task.density for task in self.evaluation.tasks)
        return [task for task in self.evaluation.tasks if task.density == least]

    def _short(self) -> TwinEvaluation:
        """Return the evaluation of corrupted reports, at the largest density."""
        dense = max(task.density for task in self.evaluation.tasks)
        cycles = min(CORRUPTION_CYCLES, self.evaluation.cycles)
        return TwinEvaluation(self.evaluation.world, (dense,), cycles)

    def _redrawn(self, task: TwinTask, name: str, scored: CycleScores) -> None:
        count = len(self.scores.seeds)
        median = self.evaluation.error(task, scored).quantile(0.5, dim=0).tolist()
        place = f"{task.name}/redrawn"
        self.found += [
            Row(name, place, f"rmse_{label}", value, n=count)
            for label, value in zip(self.scores.labels, median, strict=True)
        ]
        self.found.append(Row(name, place, "lost", float(scored.lost.sum()), n=count))


QUICK_CYCLES = 30
CORRUPTED = ("declared_over_withheld", "denied_over_withheld", "forced_over_withheld")


class TwinExperiment:
    """Tasks, methods, tuning and scores of a world, see :class:`~..experiment.Experiment`.

    Args:
        world: Nature, forecast models and observation errors.
    """

    forms = COMPARED
    reference = REFERENCE
    base = ("free_run",)
    decisive = ("world",)
    pictures_file = "cycles.safetensors"
    attribution = ""
    notes: tuple[str, ...] = (
        "Lost timelines are scored as the free run. In the perfect model the free run is the truth "
        "of 24 hours before, as it starts there, and not an independent trajectory of the model: "
        "lost timelines are scored too well by it.",
        "Optimal interpolation takes its covariances from day differences, while networks train on "
        "recorded backgrounds with their truths: the two were not given the same data.",
    )

    def __init__(self, world: TwinWorld) -> None:
        self.world = world
        self.grid, self.channels = world.grid, world.channels

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, lost timelines, and the effect of bad reports."""
        return shown(self.channels, "rmse") | {"lost", *CORRUPTED}

    @property
    def field(self) -> str:
        """Label of the first channel."""
        return self.channels.labels[0]

    @property
    def max_seeds(self) -> int:
        """Timelines for testing, one a seed."""
        return len(self.world.members["test"])

    @property
    def max_cycles(self) -> int:
        """Cycles of a timeline."""
        return self.world.cycles

    @property
    def observation_error(self) -> Tensor:
        """(C,) of the world."""
        return self.world.error_sd

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[TwinTask]:
        """Return both forecast models at every density."""
        return twin_tasks(densities)

    def methods(self, task: str) -> list[Method]:  # noqa: ARG002
        """Return the classical methods, the same for all tasks."""
        return TwinMethods(self.world).all()

    def background_error(self, task: str) -> None:
        """Return None: one network, with its own estimate, serves all tasks."""

    def store(self, folder: Path) -> Path:  # noqa: ARG002
        """Return the nature run."""
        return self.world.path

    def make_truth(self, progress: Progress = silent) -> None:
        """Run nature, or the rest of it, where it is missing."""
        world = self.world
        if not world.path.exists():
            with progress("nature run", world.calls) as tick:
                world.prepare(progress=lambda *_: tick())
        world.prepare()

    def data(self) -> list[Data]:
        """Return the nature run."""
        return [Data.of(self.world.path.name, "truth", self.world.path)]

    def training_objects(self) -> list[str]:
        """Return the members for training, and those for validation, which choose weights."""
        return self.world.objects("training", "validation")

    def test_objects(self) -> list[str]:
        """Return the members for testing."""
        return self.world.objects("test")

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,
        *,
        cycles: int,
        settings: Settings = MappingProxyType({}),  # noqa: ARG002
    ) -> dict[str, Trial]:
        """Return what is tuned on the tuning timelines.

        Classical methods are tuned for every density and forecast model; the learning rate and
        weight decay of a form of Adas once, by the geometric mean over the tasks: the worst of
        them is often lost after so few steps, and then carries no information.
        """
        evaluation = TwinEvaluation(self.world, densities, cycles)
        found = {
            choice_name(method.name, task.name): Trial(
                method.box, partial(_trial, evaluation, method, task)
            )
            for method in evaluation.classical()
            for task in evaluation.tasks
            if method.box
        }
        for form in COMPARED:
            found[form] = Trial(OPTIMIZER_BOX, partial(_network_trial, evaluation, fit, form))
        return found

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> TwinScores:
        """Return the evaluation on the test timelines, quickly on 30 cycles of them."""
        evaluation = TwinEvaluation(
            self.world, densities, min(QUICK_CYCLES, self.world.cycles) if quick else None
        )
        return TwinScores(evaluation, load, seeds, forms, settings)

    def checks(self, scores: TwinScores) -> Sequence[Checks]:
        """Return the checks of the increment form."""
        return (TwinChecks(scores),) if {FORM, CONTROL} <= set(scores.forms) else ()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return the error of every method over the cycles, one figure per task."""
        figures = []
        for task in dict.fromkeys(key.split("|")[0] for key in pictures):
            errors: dict[str, np.ndarray] = {
                key.split("|")[1]: value[:, :, 0].T.numpy()
                for key, value in pictures.items()
                if key.split("|")[0] == task
            }
            variable, level = next(iter(self.channels))
            figure = cycle_figure(
                errors,
                hours=self.world.hours,
                label=f"Analysis RMSE of {field_label(variable, level)}, {task}",
                unit=unit_label(variable),
                spin_up=len(next(iter(errors.values())).T) // 3,
            )
            caption = f"Median over seeds and their range, {task}; lost timelines are the free run."
            figures.append((caption, figure))
        return figures


def _trial(evaluation: TwinEvaluation, method: Method, task: TwinTask, setting: Setting) -> float:
    return evaluation.tuning_score(task, method.build(setting))


def _network_trial(evaluation: TwinEvaluation, fit: Fit, form: str, setting: Setting) -> float:
    network = fit(form, setting)
    return statistics.geometric_mean(
        evaluation.tuning_score(task, network) for task in evaluation.tasks
    )
