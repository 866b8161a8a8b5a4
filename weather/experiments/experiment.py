"""What an experiment offers: tasks, methods, tuning and scores against a truth that is known.

Twin worlds and the ERA5 ensemble sample are experiments. A new one is a class with what
:class:`Experiment` lists, named as the data source of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from matplotlib.figure import Figure
from torch import Tensor

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from harness.files import Data
from weather.baselines.assimilator import Assimilator
from weather.experiments.method import Box, Method, Setting, Settings
from weather.models.adas.analysis import AdasAnalysis
from weather.observations.gridded import GriddedObservations
from weather.progress import Progress, Tick, no_tick, silent
from weather.state import ChannelSpec
from weather.training.stream import ProblemSource

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
    """What is tuned: a box of settings, and the score of one, the smaller the better."""

    box: Box
    score: Callable[[Setting], float]


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
    """

    method: str
    task: str
    ticks: int = 1
    scope: tuple[tuple[str, str | int], ...] = ()


class Checks(Protocol):
    """Work that ends in rows and bars: every piece is computed, in whatever process, and taken."""

    def works(self) -> list[Work]:
        """Return what is to be computed, in the order in which it is to be taken."""

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return what a piece of the work found, a function of its arguments alone."""

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep what :meth:`compute` returned, for rows and bars."""

    def rows(self) -> list[Row]:
        """Return every figure."""

    def bars(self) -> list[Bar]:
        """Return what must hold."""


class Scores(Checks, Protocol):
    """Every method on every task, and what figures are drawn from.

    Attributes:
        forms: Forms of Adas that are scored.
        seeds: Seeds of their networks.
    """

    forms: tuple[str, ...]
    seeds: tuple[int, ...]

    def pictures(self) -> dict[str, Tensor]:
        """Return what :meth:`Experiment.figures` draws."""

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
    def max_seeds(self) -> int | None:
        """Largest number of seeds of an evaluation, None for any."""

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

    def trials(self, densities: Sequence[float], fit: Fit, *, cycles: int) -> Mapping[str, Trial]:
        """Return what is to be tuned, by its name in settings.

        Args:
            densities: Fractions of grid points observed.
            fit: Trains a network for a few steps.
            cycles: Cycles of a trial, where there are cycles.
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
        """Draw what :meth:`Scores.pictures` returned: captions and figures."""


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
