"""Twin worlds as an experiment whose test timelines no choice has seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import Data, sha256, short_digest
from weather.baselines.assimilator import Assimilator
from weather.cycle import Forecast
from weather.experiments.experiment import (
    DENSITIES,
    Checks,
    Fit,
    Load,
    Method,
    Setting,
    Settings,
    Trial,
    choice_name,
)
from weather.experiments.osse.osse_cycles import OsseCycles
from weather.experiments.osse.osse_scores import OsseScores
from weather.experiments.osse.recorded_errors import TURNS, RecordedErrors
from weather.experiments.osse.rivals import ALONE, FORMS, INTERPOLATION, SHARES, Rivals
from weather.experiments.osse.scenarios import OsseTask, Protocol, osse_tasks
from weather.experiments.osse.sealed_world import OsseWorld, seal
from weather.models.adas.analysis import AdasAnalysis, AnalysisForm
from weather.plots import cycle_figure, field_label, unit_label
from weather.progress import Progress, silent
from weather.training.stream import AssimilationBatch

QUICK_CYCLES = 30
CONFIGURATION = "osse"


class OsseExperiment:
    """Tasks, methods, tuning and scores, see :class:`~..experiment.Experiment`.

    Args:
        world: Nature, forecast models and observation errors; its members for training, tuning and
            validation are those that the networks were trained and chosen on.
        folder: Of recorded errors and of the sealed world, made when missing.
        networks: Name of the shipped networks, such as ``osse_shallow_water``, or a run folder
            with networks. They are read, never written.
        protocol: ``osse`` for fixed networks of reports, ``outage`` for ten silent days and single
            reports, ``mixed`` for densities and qualities that change with every cycle.
        densities: Fractions of grid points observed for which errors are recorded.
        num_sealed: Timelines for testing.
    """

    forms: tuple[str, ...] = ()
    reference = INTERPOLATION
    base = ("free_run", INTERPOLATION)
    decisive = ("world",)
    pictures_file = "cycles.safetensors"
    attribution = ""
    max_seeds = None
    notes = (
        "Lost timelines count as climatology. Test timelines are those of a sealed world, whose "
        "seed follows from the shipped weights and choices.",
    )

    def __init__(
        self,
        world: OsseWorld,
        folder: str,
        networks: str = "osse_shallow_water",
        protocol: Protocol = "osse",
        densities: tuple[float, ...] = DENSITIES,
        num_sealed: int = 16,
    ) -> None:
        if num_sealed < 1:
            raise ValueError(f"num_sealed must be at least 1, got {num_sealed}")
        self.world, self.folder, self.networks = world, Path(folder), networks
        self.protocol, self.densities = protocol, densities
        self.num_sealed, self.seed = num_sealed, 0
        self.grid, self.channels = world.grid, world.channels

    @cached_property
    def sealed(self) -> OsseWorld:
        """The world whose timelines are scored."""
        seed = seal(self.networks, CONFIGURATION)
        path = self.folder / f"sealed-{seed:016x}.zarr"
        return self.world.sealed(seed, self.num_sealed, path)

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, ratios, time, and lost timelines."""
        others = {"over_oi", "rms_over_oi", "milliseconds", "lost", "over_ungated_oi",
                  "rms_over_ungated_oi", "over_background", "worst_over_background", "changed",
                  "rmse_silent_10_days", "rmse_recovered_5_days", "rmse_recovered_10_days",
                  "seeds"}  # fmt: skip
        return {f"rmse_{self.field}", *others}

    @property
    def field(self) -> str:
        """Label of the first channel."""
        return self.channels.labels[0]

    @property
    def max_cycles(self) -> int:
        """Cycles of a timeline."""
        return self.world.cycles

    @property
    def observation_error(self) -> Tensor:
        """(C,) of the world."""
        return self.world.error_sd

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[OsseTask]:
        """Return the tasks of the protocol."""
        return osse_tasks(self.protocol, densities)

    def _task(self, name: str) -> OsseTask:
        known = {task.name: task for protocol in ("osse", self.protocol)
                 for task in osse_tasks(protocol, self.densities)}  # type: ignore[arg-type]  # fmt: skip
        return known[name]

    def methods(self, task: str) -> list[Method]:
        """Return the methods for a task; those that correct interpolation cannot be built."""
        known, rivals = self._task(task), self._rivals(self.world)
        corrected = [Method(name, _not_offered, SHARES) for name in FORMS]
        return [*rivals.classical(known), *corrected, *(rivals.alone(form, 0) for form in ALONE)]

    def background_error(self, task: str) -> None:
        """Return None: one network, with its own estimate, serves all tasks."""

    def store(self, folder: Path) -> Path:  # noqa: ARG002
        """Return the nature run."""
        return self.world.path

    def forecast(self, task: OsseTask) -> Forecast:
        """Return the forecast model of a task."""
        return self.world.model if task.model == "perfect" else self.world.imperfect

    def recorded(self) -> RecordedErrors:
        """Return the recorded errors of the training members."""
        return RecordedErrors(self.world, self.folder, self.forecast)

    def _rivals(self, world: OsseWorld) -> Rivals:
        return Rivals(world, self.recorded(), self.network)

    def prepare(self, progress: Progress = silent) -> None:
        """Make the nature run and the recorded errors where they are missing."""
        for _ in self.make(self.folder, progress):
            pass

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Do the same, and yield their paths."""
        yield _nature(self.world, "nature run", progress)
        recorded, cycles = self.recorded(), self.world.cycles
        bases = dict.fromkeys(task.base for task in self.tasks(self.densities))
        missing = [(task, turn) for task in bases for turn in recorded.missing(task)]
        if missing:
            with progress("recording background errors", cycles * len(missing)) as tick:
                for task, turn in missing:
                    recorded.make(task, turn, tick)
        yield from (recorded.path(task, turn) for task in bases for turn in TURNS)

    def make_truth(self, progress: Progress = silent) -> None:
        """Make the nature runs of both worlds and the recorded errors where they are missing."""
        self.prepare(progress)
        _nature(self.sealed, "sealed world", progress)

    def check(self) -> None:
        """Refuse training.

        Raises:
            GatesError: Always.
        """
        raise GatesError(
            f"this configuration trains nothing, its networks are those of {self.networks}: train "
            "with that configuration"
        )

    def setup(self) -> None:
        """Refuse training, see :meth:`check`."""
        self.check()

    def problem(
        self,
        step: int,  # noqa: ARG002
        timeline: int,  # noqa: ARG002
        *,
        validation: bool = False,  # noqa: ARG002
    ) -> AssimilationBatch:
        """Refuse training, see :meth:`check`."""
        self.check()
        raise AssertionError

    def data(self) -> list[Data]:
        """Return both nature runs."""
        worlds = {"truth": self.world, "sealed truth": self.sealed}
        return [Data.of(world.path.name, name, world.path) for name, world in worlds.items()]

    def training_objects(self) -> list[str]:
        """Return the members for training, and those for validation, which choose weights."""
        return self.world.objects("training", "validation")

    def test_objects(self) -> list[str]:
        """Return the members of the sealed world."""
        return self.sealed.objects("test")

    def _weights(self, form: str, seed: int) -> Path:
        """Return the folder of a network, of the package or of a run."""
        name = f"weights/{form}-s{seed}"
        shipped = Path(str(files("weather"))) / "weights" / self.networks / name
        return shipped if shipped.is_dir() else Path(self.networks) / name

    def not_trained(self, form: str, seed: int) -> str:
        """Return the command that trains a network; empty where it exists."""
        if (self._weights(form, seed) / AnalysisForm.FILE).is_file():
            return ""
        gated = "" if form == "adas_increment" else " --model.network.gated false"
        name = Path(self.networks).name
        return (
            f"not trained: run `gates weather fit --config {name} --seed_everything {seed} "
            f"--data.source.init_args.seed {seed}{gated}`, then evaluate with "
            f"`--data.source.init_args.networks runs/weather/{name}`"
        )

    def network(self, form: str, seed: int) -> AdasAnalysis:
        """Return a network in evaluation mode.

        Raises:
            GatesError: It is missing or damaged.
        """
        if told := self.not_trained(form, seed):
            raise GatesError(f"{form} of seed {seed} is {told}")
        return AnalysisForm().load(self._weights(form, seed))

    def identity(self, form: str, seeds: Sequence[int]) -> str:
        """Return 8 digits that identify the networks of a form and some seeds."""
        return short_digest([sha256(self._weights(form, s) / AnalysisForm.FILE) for s in seeds], 8)

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,  # noqa: ARG002
        *,
        cycles: int,
        settings: Settings,
    ) -> dict[str, Trial]:
        """Return what is tuned on the timelines for tuning and validation.

        Corrections are tuned once interpolation is. Three settings get twice the trials of two.
        """
        rivals = self._rivals(self.world)
        runs = OsseCycles(self.world, rivals, cycles)
        found: dict[str, Trial] = {}
        for task in self.tasks(densities):
            methods = [method for method in rivals.classical(task) if method.box]
            own = dict(settings.get(choice_name(INTERPOLATION, task.chosen_for), {}))
            trained = [name for name in FORMS if own and not self.not_trained(FORMS[name], 0)]
            methods += [rivals.corrected(name, 0, task, own) for name in trained]
            for method in methods:
                form = FORMS.get(method.name)
                builds_on = (
                    {"interpolation": own, "weights": self.identity(form, [0])} if form else {}
                )
                found[choice_name(method.name, task.chosen_for)] = Trial(
                    method.box,
                    partial(_score, runs, task.base, method),
                    2 if len(method.box) > 2 else 1,
                    builds_on,
                )
        return found

    def scores(
        self,
        densities: Sequence[float],
        load: Load,  # noqa: ARG002
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> OsseScores:
        """Return the evaluation on the sealed timelines, quickly on 30 cycles of them.

        Raises:
            GatesError: One network is given in place of those of the configuration.
        """
        if forms:
            raise GatesError(
                "this configuration takes no --ckpt_path: give a run folder of networks as "
                "--data.source.init_args.networks"
            )
        count = min(QUICK_CYCLES, self.world.cycles) if quick else None
        cycles = OsseCycles(self.sealed, self._rivals(self.sealed), count)
        return OsseScores(
            cycles, self.tasks(densities), seeds, settings, self.not_trained, self.identity
        )

    def checks(self, scores: OsseScores) -> Sequence[Checks]:  # noqa: ARG002
        """Return nothing: all is among the scores."""
        return ()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return the error of every method over the cycles, one figure per task."""
        found = []
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
            found.append((f"Median over timelines and their range, {task}.", figure))
        return found


def _not_offered(setting: Setting) -> Assimilator:
    raise GatesError(
        f"corrections of interpolation ({setting}) are scored by `evaluate`, not offered by "
        "`assimilate`: take --method oi"
    )


def _score(runs: OsseCycles, task: OsseTask, method: Method, setting: Setting) -> float:
    return runs.score(task, method.name, method.build(setting))


def _nature(world: OsseWorld, label: str, progress: Progress) -> Path:
    """Make the nature run of a world where it is missing, and return its path."""
    if not world.path.exists():
        with progress(label, world.calls) as tick:
            world.prepare(progress=lambda *_: tick())
    world.prepare()
    return world.path
