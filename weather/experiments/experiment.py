"""What an experiment offers: tasks, methods, tuning and scores against a truth that is known."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from harness.files import Data, replacing
from weather.baselines.assimilator import Assimilator
from weather.models.adas.analysis import AdasAnalysis
from weather.models.adas.presets import FORMS
from weather.observations.gridded import GriddedObservations
from weather.progress import Progress, Tick, no_tick, silent
from weather.state import ChannelSpec
from weather.training.stream import ProblemSource

Box = Mapping[str, tuple[float, float] | tuple[float, float, float] | list[float]]
Setting = dict[str, float]

SWITCHES = frozenset({"turn"})
"""Settings that choose one of two things, so that an edge of their box means nothing."""

OPTIMIZER_BOX: Box = {"learning_rate": (5e-4, 1e-2), "weight_decay": (1e-3, 1e-1)}
"""Box of the optimizer of every network."""


class Method(NamedTuple):
    """A method of an experiment.

    Attributes:
        name: Its name in tables and settings.
        build: Returns the assimilator for a setting.
        box: Bounds of the settings, or a list of values; empty where there is nothing to tune.
        members: Ensemble size.
        builds_on: Method whose setting ``build`` is given, too; its own values count first.
        weights: File of its network, if it has one.
    """

    name: str
    build: Callable[[Setting], Assimilator]
    box: Box = MappingProxyType({})
    members: int = 1
    builds_on: Method | None = None
    weights: Path | None = None


Settings = Mapping[str, Mapping[str, float]]
"""Tuned settings: ``"<method>@<task>"`` to the values of the method's box."""


def choice_name(method: str, task: str) -> str:
    """Return the name of what is tuned: a method for a task."""
    return f"{method}@{task}"


def is_stored(settings: Settings, method: Method, task: str) -> bool:
    """Return whether every value of the method's box is stored for a task."""
    return set(settings.get(choice_name(method.name, task), {})) == set(method.box)


def stored(settings: Settings, method: Method, task: str) -> Setting:
    """Return the setting of a method for a task, the middle of its box where none is stored.

    It includes that of the method on which it builds.
    """
    base = stored(settings, method.builds_on, task) if method.builds_on else {}
    if is_stored(settings, method, task):
        return base | dict(settings.get(choice_name(method.name, task), {}))
    return base | {
        name: side[len(side) // 2] if isinstance(side, list) else (side[0] * side[1]) ** 0.5
        for name, side in method.box.items()
    }


def built(settings: Settings, method: Method, task: str) -> Assimilator:
    """Return a method with its stored setting, or with the middle of its box.

    Raises:
        GatesError: It refuses the setting.
    """
    try:
        return method.build(stored(settings, method, task))
    except ValueError as error:
        raise GatesError(
            f"the setting of {choice_name(method.name, task)} cannot be used ({error}): run "
            "`gates weather tune --overwrite`"
        ) from error


def save_pictures(path: Path, pictures: Mapping[str, Tensor]) -> None:
    """Write tensors by name, atomically."""
    with replacing(path) as new:
        save_file({name: t.contiguous().clone() for name, t in pictures.items()}, new)


def load_pictures(path: Path) -> dict[str, Tensor]:
    """Read what `save_pictures` wrote; nothing where there is no file.

    Raises:
        GatesError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise GatesError(
            f"{path} is damaged ({error}): run `gates weather evaluate` again"
        ) from error


DENSITIES = (0.1, 0.01)

Load = Callable[[str, int], AdasAnalysis]
"""Returns the trained network of a form and a seed, in evaluation mode."""

Fit = Callable[[str, Setting], AdasAnalysis]
"""Returns a network of a form after a short training with a setting of its optimizer."""


class Task(Protocol):
    """What is to be analyzed, the same for every method."""

    @property
    def name(self) -> str:
        """Name in settings and tables, such as ``0.1/perfect``."""

    @property
    def density(self) -> float:
        """Fraction of grid points observed."""


class Trial(NamedTuple):
    """What is tuned.

    Attributes:
        space: Box of settings, or a list of those that are tried.
        score: Returns the score of a setting, the smaller the better.
        share: Trials in units of those of the budget.
        builds_on: What else the score depends on, by name, such as choices made before.
        plain: Setting of a box that is tried first; none if empty.
    """

    space: Box | Sequence[Setting]
    score: Callable[[Setting], float]
    share: int = 1
    builds_on: Mapping[str, Any] = MappingProxyType({})
    plain: Mapping[str, float] = MappingProxyType({})

    @property
    def axes(self) -> list[str]:
        """Names of the settings."""
        return list(self.space if isinstance(self.space, Mapping) else self.space[0])

    def limited(self, trials: int) -> tuple[Box | Sequence[Setting], int]:
        """Return what is searched with a budget of trials, and with how many of them."""
        if isinstance(self.space, Mapping):
            return self.space, trials * self.share
        return self.space[:trials], len(self.space[:trials])


class Example(NamedTuple):
    """One analysis by a network, to look at its gates.

    Attributes:
        network: The network.
        background: (1,1,C,H,W).
        observations: Fields (1,C,H,W).
        background_sd: (C,) expected background error; None for that of the network.
    """

    network: AdasAnalysis
    background: Tensor
    observations: GriddedObservations
    background_sd: Tensor | None = None


class Work(NamedTuple):
    """One method on one task: computed, kept and resumed as a whole.

    Attributes:
        method: Name of the method or form.
        task: Name of the task.
        ticks: How often its computation ticks.
        scope: What else identifies it, by name, such as its timelines; a name that ends in a hyphen
            keeps its value from being read as a part of it.
        chosen_for: Task whose tuned setting it has, its own if empty.
    """

    method: str
    task: str
    ticks: int = 1
    scope: tuple[tuple[str, str | int], ...] = ()
    chosen_for: str = ""


class Checks(Protocol):
    """Work that ends in rows and bars: every piece is computed, in whatever process, and taken."""

    def works(self) -> list[Work]:
        """Return what is to be computed, in the order in which it is to be taken."""

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return what a piece of the work found, a function of its arguments alone."""

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Store the tensors that `compute` returned, for rows and bars."""

    def rows(self) -> list[Row]:
        """Return a row for every figure that was computed."""

    def bars(self) -> list[Bar]:
        """Return the criteria that the figures must meet."""


class Scores(Checks, Protocol):
    """Every method on every task, and what figures are drawn from.

    Attributes:
        forms: Forms of Adas that are scored.
        seeds: Seeds of their networks.
    """

    forms: tuple[str, ...]
    seeds: tuple[int, ...]

    def pictures(self) -> dict[str, Tensor]:
        """Return the tensors that `Experiment.figures` draws, by name."""

    def example(self) -> Example:
        """Return one analysis at the largest density, by the increment form if it is scored."""


class Experiment(ProblemSource, Protocol):
    """A source of training problems whose truth is known for tuning and testing, too.

    Attributes:
        forms: Forms of Adas that take part unless others are asked for.
        reference: Method that others are compared with in figures.
        base: Methods that the figures of all others need.
        decisive: Arguments of the source that decide truth, classical methods and scores; the
            others are about training alone.
        notes: What a reader of the scores must know, a sentence each.
        pictures_file: Name of the file of what figures are drawn from.
        attribution: Who made the data; empty if they are our own.
    """

    forms: tuple[str, ...]
    reference: str
    base: tuple[str, ...]
    decisive: tuple[str, ...]
    notes: tuple[str, ...]
    pictures_file: str
    attribution: str

    @property
    def headline(self) -> set[str]:
        """Metrics of tables and reports; the others are in ``scores.json`` alone."""

    @property
    def field(self) -> str:
        """Label of the channel of the scorecard."""

    @property
    def max_cycles(self) -> int | None:
        """Largest number of cycles of a trial, None where there are none."""

    @property
    def observation_error(self) -> Tensor:
        """Standard deviations (C,) of the errors of simulated observations."""

    def tasks(self, densities: Sequence[float] = DENSITIES) -> Sequence[Task]:
        """Return the tasks, the default one first."""

    def methods(self, task: str) -> list[Method]:
        """Return the classical methods for a task, by its name."""

    def background_error(self, task: str) -> Tensor | None:
        """Return the standard deviations (C,) of the background error that a task has.

        None leaves it to the network, which was trained on this task.
        """

    def store(self, folder: Path) -> Path:
        """Return the path of the truth as a store, in a run folder unless it is configured."""

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:
        """Write the data that are missing and yield each file or folder when it is complete."""

    def make_truth(self, progress: Progress = silent) -> None:
        """Make what scores need, which may be less than what training needs."""

    def check(self) -> None:
        """Refuse existing data that are not those of the configuration.

        Raises:
            GatesError: They are damaged or belong to another experiment.
        """

    def data(self) -> list[Data]:
        """Return what the scores are computed from, which must exist."""

    def training_objects(self) -> list[str]:
        """Return short hashes of what networks are trained on, one for each member or day."""

    def test_objects(self) -> list[str]:
        """Return short hashes of what scores are computed on; none of them is trained on."""

    def trials(
        self, densities: Sequence[float], fit: Fit, *, cycles: int, settings: Settings
    ) -> Mapping[str, Trial]:
        """Return what is to be tuned, by its name in settings.

        Args:
            densities: Fractions of grid points observed.
            fit: Trains a network for a few steps.
            cycles: Cycles of a trial, where there are cycles.
            settings: What was tuned before; it may add what builds on it.
        """

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> Scores:
        """Return the evaluation, which is still to be run.

        Args:
            densities: Fractions of grid points observed.
            load: Returns networks.
            seeds: Of the networks, and of the timelines where there are any.
            forms: Forms of Adas.
            settings: Tuned settings of the classical methods.
            quick: Only a few cycles or cases.
        """

    def checks(self, scores: Any) -> Sequence[Checks]:
        """Return what a full evaluation shows beyond its scores, which were run before."""

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Draw what `Scores.pictures` returned: captions and figures."""


UNMEASURED = "not measured: its networks are not trained"


@runtime_checkable
class Concluding(Protocol):
    """Scores that sum up what their rows show."""

    def conclusion(self, rows: Sequence[Row]) -> str:
        """Return the sentences."""


@runtime_checkable
class Borrowing(Protocol):
    """An experiment that compares on tasks of another configuration, too."""

    def borrowed(self, densities: Sequence[float]) -> list[str]:
        """Return names of settings that the other configuration has tuned."""


def experiment_of(source: ProblemSource) -> Experiment:
    """Return a source that is an experiment.

    Raises:
        GatesError: It offers training problems only.
    """
    if not hasattr(source, "scores"):
        raise GatesError(
            f"data.source is {type(source).__name__}, which has no scores: a source of training "
            "problems alone can be used with fit only, see weather.experiments.experiment"
        )
    return cast(Experiment, source)


def shown(channels: ChannelSpec, *stems: str) -> set[str]:
    """Return metrics to be shown, such as ``rmse_z500``: of many levels the one in the middle."""
    middle = channels.levels[len(channels.levels) // 2] if len(channels.levels) > 3 else None
    labels = [
        label
        for label, (_, level) in zip(channels.labels, channels, strict=True)
        if middle is None or level in (None, middle)
    ]
    return {f"{stem}_{label}" for stem in stems for label in labels}


def classical(methods: Sequence[Method], name: str) -> Method:
    """Return a method by its name."""
    return next(method for method in methods if method.name == name)


def expecting(network: AdasAnalysis, background_sd: Tensor | None) -> Assimilator:
    """Return a network that expects another background error (C,), if one is given."""
    return network if background_sd is None else network.expecting(background_sd)


Score = Callable[[Any, str, Assimilator], float]
"""Returns what tuning minimizes, of a task, the name of a method and the method."""


class TunedExperiment(Experiment):
    """What experiments share that tune every method with a box, and the optimizer of every form.

    Attributes:
        tuned: The forms of Adas.
    """

    tuned: tuple[str, ...] = tuple(FORMS)
    attribution = ""

    @property
    def field(self) -> str:
        """Label of z500 if there is such a channel, else of the first one."""
        return "z500" if "z500" in self.channels.labels else self.channels.labels[0]

    @property
    def max_cycles(self) -> int | None:
        """None: there are no cycles."""
        return None

    def background_error(self, task: str) -> Tensor | None:  # noqa: ARG002
        """Return None: the network, with its own estimate, serves all tasks."""
        return None

    def checks(self, scores: Any) -> Sequence[Checks]:  # noqa: ARG002
        """Return nothing: all is among the scores."""
        return ()

    @abstractmethod
    def scorer(self, cycles: int) -> Score:
        """Return the function that scores a method on a task for tuning, over ``cycles`` if any."""

    def pooled(self, scores: Sequence[float]) -> float:
        """Return the score of a form of Adas over its tasks: the worst."""
        return max(scores)

    def choices(self, densities: Sequence[float]) -> list[tuple[Task, Method]]:
        """Return every method on every task, in the order in which they are tuned."""
        return [
            (task, method) for task in self.tasks(densities) for method in self.methods(task.name)
        ]

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,
        *,
        cycles: int = 0,
        settings: Settings = MappingProxyType({}),  # noqa: ARG002
    ) -> dict[str, Trial]:
        """Return what is tuned: methods for every task, a form of Adas once for all of them."""
        score, tasks = self.scorer(cycles), self.tasks(densities)
        by_form = {
            choice_name(method.name, task.name): Trial(
                method.box, partial(self._trial, score, task, method)
            )
            for task, method in self.choices(densities)
            if method.box
        }
        for form in self.tuned:
            networks = partial(self._network_trial, score, tasks, fit, form)
            by_form[form] = Trial(OPTIMIZER_BOX, networks)
        return by_form

    def _trial(self, score: Score, task: Task, method: Method, setting: Setting) -> float:
        return score(task, method.name, method.build(setting))

    def _network_trial(
        self, score: Score, tasks: Sequence[Task], fit: Fit, form: str, setting: Setting
    ) -> float:
        network = fit(form, setting)
        return self.pooled(
            [
                score(task, form, expecting(network, self.background_error(task.name)))
                for task in tasks
            ]
        )
