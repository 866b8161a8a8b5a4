"""Twin worlds as an experiment whose test timelines no choice has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from core_gates.errors import GatesError
from harness.evidence import Row
from harness.files import Data, sha256, short_digest
from harness.files.piece import read_record, refuse_changed
from weather.baselines.assimilator import Assimilator
from weather.baselines.optimal_interpolation import CorrectedInterpolation, OptimalInterpolation
from weather.experiments.experiment import (
    DENSITIES,
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
from weather.experiments.osse.recorded_errors import (
    SECOND,
    SPARSE,
    TURNS,
    CycledProblems,
    RecordedErrors,
)
from weather.experiments.osse.rivals import (
    ALONE,
    CORRECTIONS,
    DAMPED,
    FEW,
    FRACTIONS,
    INTERPOLATION,
    Rivals,
    turn_of,
)
from weather.experiments.osse.sealed_world import OsseWorld, seal
from weather.experiments.twin.scenarios import OsseTask, Protocol, osse_tasks
from weather.experiments.twin.twin_cycles import TIMES, settled
from weather.experiments.twin.twin_experiment import QUICK_CYCLES, TwinExperiment
from weather.experiments.twin.twin_scores import paired
from weather.models.adas.analysis import AdasAnalysis, AnalysisForm
from weather.progress import Progress, silent
from weather.training.correction_module import fractions
from weather.training.stream import AssimilationBatch

CONFIGURATION = "osse"
SEALED = (CONFIGURATION, "outage", "mixed")  # configurations that share a sealed world
SEEDS = (0, 1, 2)  # of the networks that share a setting


class OsseExperiment(TwinExperiment):
    """Tasks, methods, tuning and scores, see `..experiment.Experiment`.

    Args:
        world: Nature, forecast models and observation errors; its members for training, tuning and
            validation are those that the networks were trained and chosen on.
        folder: Of recorded errors and of the sealed world, made when missing.
        networks: Name of the shipped networks, such as ``osse_shallow_water``, or a run folder
            with networks. They are read, never written.
        corrections: Run folder of networks that ``fit --form`` trained as corrections, those that
            ship if null; where there are none, corrections are made of ``networks``.
        protocol: ``osse`` for fixed networks of reports, ``outage`` for ten silent days and single
            reports, ``mixed`` for densities and qualities that change with every cycle.
        densities: Fractions of grid points observed for which errors are recorded.
        num_sealed: Timelines for testing.
    """

    world: OsseWorld
    forms: tuple[str, ...] = ()
    base = ("free_run", INTERPOLATION, DAMPED)
    notes = (
        "Lost timelines count as climatology. Test timelines are those of a sealed world, whose "
        "seed follows from the shipped weights and choices.",
    )

    def __init__(
        self,
        world: OsseWorld,
        folder: str,
        networks: str = "osse_shallow_water",
        corrections: str | None = None,
        protocol: Protocol = "osse",
        densities: tuple[float, ...] = DENSITIES,
        num_sealed: int = 16,
    ) -> None:
        if num_sealed < FEW:
            raise ValueError(f"num_sealed must be at least {FEW}, got {num_sealed}")
        super().__init__(world)
        self.folder, self.networks = Path(folder), networks
        self.corrections = corrections
        self.protocol, self.densities = protocol, densities
        self.num_sealed, self.seed = num_sealed, 0
        self.rows = 0
        self.form: str | None = None

    @cached_property
    def sealed(self) -> OsseWorld:
        """The world whose timelines are scored."""
        parts = [f"{name}/{kind}/*" for name in SEALED for kind in ("weights", "choices")]
        if kept_weights(self.networks) != Path(self.networks) / "weights":
            parts += [f"{self.networks}/weights/{form}-s*" for form in ALONE]
        seed = seal(*parts)
        if seed == self.world.seed:
            raise GatesError(f"the sealed world has the seed {seed} of the configured one: give "
                             "another world.seed")  # fmt: skip
        return self.world.sealed(seed, self.num_sealed, self.folder / f"sealed-{seed:016x}.zarr")

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, ratios, time, and lost timelines."""
        others = {"over_oi", "rms_over_oi", *TIMES, "lost", "over_ungated_oi",
                  "rms_over_ungated_oi", "over_damped_oi", "over_background",
                  "worst_over_background", "changed",
                  "rmse_silent_10_days", "rmse_recovered_5_days", "rmse_recovered_10_days",
                  "seeds"}  # fmt: skip
        return {f"rmse_{self.field}", *others}

    def tasks(self, densities: Sequence[float] = ()) -> list[OsseTask]:
        """Return the tasks of the protocol, of all densities by default.

        Raises:
            GatesError: For one of the densities no errors are recorded.
        """
        if set(densities) - set(self.densities):
            raise GatesError(
                f"--densities {list(densities)} are not among {list(self.densities)}, for which "
                "errors are recorded: add them to data.source.init_args.densities"
            )
        return osse_tasks(self.protocol, densities or self.densities)

    def _pooled(self, densities: Sequence[float]) -> list[OsseTask]:
        """Return the tasks over which gates are compared besides those of the protocol."""
        return osse_tasks("osse", densities) if self.protocol == "mixed" else []

    def borrowed(self, densities: Sequence[float]) -> list[str]:
        """Return names of settings that another configuration has tuned."""
        names = (INTERPOLATION, *CORRECTIONS)
        return [choice_name(name, t.name) for t in self._pooled(densities) for name in names]

    def _task(self, name: str) -> OsseTask:
        by_name = {task.name: task for protocol in ("osse", self.protocol)
                 for task in osse_tasks(protocol, self.densities)}  # type: ignore[arg-type]  # fmt: skip
        return by_name[name]

    def methods(self, task: str) -> list[Method]:
        """Return the methods for a task; increments of networks end with the reports."""
        task_of_name, rivals = self._task(task), self._rivals(self.world)
        corrected = [
            rivals.corrected(name, 0, task_of_name, tapered=True)._replace(
                weights=self.weights(name, 0)
            )
            for name in CORRECTIONS
        ]
        return [
            *rivals.classical(task_of_name),
            *corrected,
            *(rivals.alone(form, 0) for form in ALONE),
        ]

    def recorded(self) -> RecordedErrors:
        """Return the recorded errors of the training members."""
        return RecordedErrors(self.world, self.folder)

    def _rivals(self, world: OsseWorld) -> Rivals:
        return Rivals(world, self.recorded(), self.network)

    def prepare(self, progress: Progress = silent) -> None:
        """Make the nature run and the recorded errors where they are missing."""
        list(self.make(self.folder, progress))

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Make the nature run and the recorded errors where missing, and yield their paths."""
        yield self.world.make(progress)
        recorded, cycles = self.recorded(), self.world.cycles
        tasks = [*osse_tasks("osse", self.densities), *self.tasks(self.densities)]
        bases = dict.fromkeys(task.base for task in tasks)
        missing = [(task, turn) for task in bases for turn in recorded.missing(task)]
        if missing:
            with progress("recording background errors", cycles * len(missing)) as tick:
                for task, turn in missing:
                    recorded.make(task, turn, tick)
        yield from (recorded.path(task, turn) for task in bases for turn in TURNS)

    def make_truth(self, progress: Progress = silent) -> None:
        """Make the nature runs of both worlds and the recorded errors where they are missing."""
        self.prepare(progress)
        self.sealed.make(progress, "sealed world")

    def check(self) -> None:
        """Refuse any training but that of a correction.

        Raises:
            GatesError: No form is to be trained.
        """
        if self.form is None:
            raise GatesError(
                "this configuration trains corrections of interpolation: add --form "
                f"{' or '.join(CORRECTIONS)}, or take --config {self.networks} to train networks "
                "alone"
            )

    def setup(self) -> None:
        """Load what a correction is trained on, and the errors of backgrounds."""
        self.normalizer = self.world.normalizer()
        self.climatological_sd = self.world.climatological_sd()
        extremes = {True: min(self.densities), False: max(self.densities)}
        tasks = {
            (int(task.model == "error"), sparse): task
            for sparse, density in extremes.items()
            for task in osse_tasks("osse", (density,))
        }
        errors = self.recorded().recording(tasks[0, True], 2).errors
        self.background_sd = errors.square().mean((0, 2, 3)).sqrt()
        if self.form is None:
            return
        models = (self.world.model, self.world.imperfect)
        self._problems = CycledProblems(
            self.world, self.recorded(), tasks, models, self.rows, self.seed
        )
        self.pool, self.interpolated = self._problems.pool, self._problems.interpolated

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> AssimilationBatch:
        """Return the problem of a row of the batch at a step of the training of a correction.

        Raises:
            GatesError: A problem for validation is asked for.
        """
        if validation:
            raise GatesError(
                "a correction is validated in a whole cycle after its training: set "
                "trainer.limit_val_batches to 0"
            )
        return self._problems.problem(step, timeline)

    def data(self) -> list[Data]:
        """Return both nature runs."""
        worlds = {"truth": self.world, "sealed truth": self.sealed}
        return [Data.of(world.path.name, name, world.path) for name, world in worlds.items()]

    def test_objects(self) -> list[str]:
        """Return the members of the sealed world."""
        return self.sealed.objects("test")

    def weights(self, name: str, seed: int) -> Path:
        """Return the file of a network, of the package or of a run.

        Args:
            name: Form of a network, or ``adas_oi`` or ``ungated_oi`` for what corrects
                interpolation: a network trained for that if there are any of the form.
            seed: Of the network.
        """
        if self._corrected(name):
            return self._corrections / f"{name}-s{seed}" / AnalysisForm.FILE
        return (
            kept_weights(self.networks)
            / f"{CORRECTIONS.get(name, name)}-s{seed}"
            / AnalysisForm.FILE
        )

    @property
    def _corrections(self) -> Path:
        """Folder of networks that were trained as corrections: of a run, or what ships."""
        return kept_weights(self.corrections) if self.corrections else shipped(CONFIGURATION)

    def _corrected(self, name: str) -> bool:
        """Return whether there are networks that were trained as this correction."""
        return name in CORRECTIONS and any(self._corrections.glob(f"{name}-s*"))

    def not_trained(self, name: str, seed: int) -> str:
        """Return the command that trains a network; empty where it exists."""
        path = self.weights(name, seed)
        if path.is_file():
            return ""
        if path.parent.name.removesuffix(f"-s{seed}") in CORRECTIONS:
            return (
                f"not trained: run `gates weather fit --config {CONFIGURATION} --form {name} "
                f"--start networks --seed_everything {seed}`, then evaluate with "
                f"`--data.source.init_args.corrections {self.folder}`"
            )
        gated = (
            ""
            if CORRECTIONS.get(name, name) == "adas_increment"
            else " --model.network.gated false"
        )
        config = Path(self.networks).name
        return (
            f"not trained: run `gates weather fit --config {config} --seed_everything {seed} "
            f"--data.source.init_args.seed {seed}{gated}`, then evaluate with "
            f"`--data.source.init_args.networks runs/weather/{config}`"
        )

    def network(self, name: str, seed: int) -> AdasAnalysis:
        """Load a trained network in evaluation mode; nothing is trained.

        Raises:
            GatesError: It is missing, damaged or changed, or was trained on sealed timelines.
        """
        if missing := self.not_trained(name, seed):
            raise GatesError(f"{name} of seed {seed} is {missing}")
        folder = self.weights(name, seed).parent
        if record := read_record(folder):
            refuse_changed(folder, record)
            if leaked := set(record.objects) & set(self.test_objects()):
                raise GatesError(f"{folder} was trained on {len(leaked)} timelines of the sealed "
                                 "world: give networks that were not")  # fmt: skip
        return AnalysisForm().load(folder)

    def identity(self, name: str, seeds: Sequence[int]) -> str:
        """Return 8 digits that identify the networks of a form and some seeds."""
        return short_digest([sha256(self.weights(name, seed)) for seed in seeds], 8)

    def train_correction(self, form: str, seed: int, rows: int) -> None:
        """Offer problems for the training of a correction.

        Args:
            form: ``adas_oi`` or ``ungated_oi``.
            seed: Of all random numbers.
            rows: Of a batch over all ranks.
        """
        self.form, self.seed, self.rows = form, seed, rows

    def over_start(
        self, trained: AdasAnalysis, start: AdasAnalysis | None, progress: Progress = silent
    ) -> Row:
        """Return the error of a correction over that of what it started from, with its interval.

        In cycles of all timelines for tuning and validation, on the first task, with the fractions
        that it was trained with. A fresh network started as interpolation.
        """
        task, rivals = self.tasks(self.densities)[0].base, self._rivals(self.world)
        runs = OsseCycles(self.world, rivals)
        length, scale = SECOND[True]
        oi = OptimalInterpolation(self.recorded().covariance(task, 2, length), scale=scale)
        errors: list[Tensor] = []
        with progress("cycles of validation", 2 * self.world.cycles) as tick:
            for network in (trained, start):
                method: Assimilator = oi
                if network is not None:
                    alpha, beta = fractions(network)
                    method = CorrectedInterpolation(network, oi, alpha=alpha, beta=beta)
                scores = runs.run(task, "correction", method, "choice", tick=tick)
                errors.append(settled(scores, runs.sd)[None])
        return paired(str(self.form), task.name, errors[0], errors[1], "start")

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,  # noqa: ARG002
        *,
        cycles: int = 0,
        settings: Settings = MappingProxyType({}),
    ) -> dict[str, Trial]:
        """Return what is tuned on the timelines for tuning and validation.

        Corrections are tuned once interpolation is, with the networks of three seeds together
        where reports are sparse; where no pair of fractions has its interval below 1, they are
        interpolation. Three settings get twice the trials of two.
        """
        rivals = self._rivals(self.world)
        runs = OsseCycles(self.world, rivals, cycles)
        by_name: dict[str, Trial] = {}
        for task in self.tasks(densities):
            chosen = dict(settings.get(choice_name(INTERPOLATION, task.chosen_for), {}))
            for method in rivals.classical(task):
                base = chosen if method.builds_on else {}
                same = base and {"relative_scale": 1.0, "turn": turn_of(base), "alpha": 1.0}
                if method.box and (base or not method.builds_on):
                    by_name[choice_name(method.name, task.chosen_for)] = Trial(
                        method.box,
                        partial(_score, runs, task.base, method, base),
                        2 if len(method.box) > 2 else 1,
                        builds_on={"interpolation": base} if base else {},
                        plain=same,
                    )
            for name in CORRECTIONS if chosen else ():
                wanted = SEEDS if task.density < SPARSE else SEEDS[:1]
                if seeds := [seed for seed in wanted if not self.not_trained(name, seed)]:
                    facts = {"interpolation": chosen, "weights": self.identity(name, seeds)}
                    nets = [rivals.corrected(name, seed, task) for seed in seeds]
                    by_name[choice_name(name, task.chosen_for)] = Trial(
                        FRACTIONS, partial(_over, runs, task.base, nets, chosen), builds_on=facts
                    )
        return by_name

    def scores(  # type: ignore[override]
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
        pooled = [
            task
            for task in ([] if quick else self._pooled(densities))
            if all(choice_name(n, task.name) in settings for n in (INTERPOLATION, *CORRECTIONS))
        ]
        alike = len({self._corrected(name) for name in CORRECTIONS}) == 1
        return OsseScores(
            cycles, self.tasks(densities), seeds, settings, self.not_trained, self.identity,
            pooled, alike=alike,
        )  # fmt: skip


def kept_weights(place: str) -> Path:
    """Return the folder of weights of a shipped configuration, or of a run folder."""
    return shipped(place) if shipped(place).is_dir() else Path(place) / "weights"


def shipped(configuration: str) -> Path:
    """Return the folder of weights that ship for a configuration, which may not exist."""
    return Path(str(files("weather"))) / "weights" / configuration / "weights"


def _score(
    runs: OsseCycles, task: OsseTask, method: Method, base: Setting, setting: Setting
) -> float:
    return runs.score(task, method.name, method.build(base | setting))


def _over(
    runs: OsseCycles, task: OsseTask, methods: Sequence[Method], base: Setting, setting: Setting
) -> float:
    built = [method.build(base | setting) for method in methods]
    return runs.over(task, built, runs.rivals.interpolation(task, base))
