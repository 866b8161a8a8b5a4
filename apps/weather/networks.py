"""Networks of a configuration: named, trained where they are missing, loaded where they exist."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from core_gates.errors import GatesError
from harness.command.configfile import TRAINER
from harness.evidence import Row
from harness.experiment import Job, Piece, Run, Store
from harness.files.piece import read_record
from harness.runs.callbacks import load_weights as load_checkpoint
from harness.runs.callbacks import seen
from harness.runs.terminal import ticking
from weather.experiments.experiment import OPTIMIZER_BOX, Experiment, Setting, Work
from weather.models.adas.analysis import AdasAnalysis, AnalysisForm, load_weights, take_weights
from weather.models.adas.presets import FORMS
from weather.training.adas_module import AdasModule
from weather.training.stream import AssimilationDataModule

NETWORK, SOURCE = "model.network.init_args", "data.source.init_args"
NEUTRAL = (
    f"{SOURCE}.recording", f"{SOURCE}.world.init_args.path", f"{SOURCE}.store", f"{SOURCE}.cache",
    f"{SOURCE}.folder", f"{NETWORK}.recompute",
)  # fmt: skip
"""Options that decide no result: paths of data whose content or settings count, and memory."""

SOURCE_SEED = f"{SOURCE}.seed"
BUDGET = ("cycles", "steps", "densities", "interpolation", "weights")
"""Settings of a choice that describe its search."""


def form_of(settings: Mapping[str, Any]) -> str | None:
    """Return the form of a configured network, None if it is none of those that are compared."""
    for form, changes in FORMS.items():
        if all(settings.get(f"{NETWORK}.{name}") == value for name, value in changes.items()):
            return form
    return None


def network_piece(
    run: Run, form: str, seed: int, optimizer: Mapping[str, float] | None = None
) -> Piece:
    """Return a network of a form and a seed.

    Args:
        run: Whose configuration it has.
        form: Name of the form.
        seed: Of weights, order and source.
        optimizer: Tuned settings; those of the configuration where there are none.
    """
    settings = {f"{NETWORK}.{name}": value for name, value in FORMS[form].items()}
    settings |= {f"model.{name}": value for name, value in (optimizer or {}).items()}
    return run.piece(form, seed, **{**settings, SOURCE_SEED: None, "seed_everything": None})


def fit_piece(run: Run) -> Piece | None:
    """Return the piece that ``fit`` trains, as ``evaluate`` names it; None without a form."""
    given, seed = run.settings.pop("seed", 0), run.settings.get(SOURCE_SEED, 0)
    form = form_of(run.settings)
    if form is None:
        return None
    piece = network_piece(run, form, seed)
    if given == seed:
        return piece
    return Piece(form, seed, settings={**piece.settings, "seed_everything": given})


def correction_piece(run: Run, form: str) -> Piece:
    """Return the piece that ``fit --form`` trains; its settings name the network it starts from."""
    return run.piece(form, run.settings.pop("seed", 0))


def world_alone(run: Run, experiment: Experiment) -> dict[str, None]:
    """Return settings that remove all but those of truth and classical methods."""
    kept = ["data.source.class_path", "data.digest"]
    kept += [f"{SOURCE}.{name}" for name in experiment.decisive]
    return {
        name: None
        for name in run.settings
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in kept)
    }


def without_training(run: Run) -> dict[str, None]:
    """Return settings that remove all in which a trial differs from a training run."""
    prefixes = ("trainer.", "checkpoint.", "data.steps", "data.validation_", "start")
    names = [name for name in run.settings if name.startswith(prefixes)]
    names += [SOURCE_SEED, "model.learning_rate", "model.weight_decay"]
    return dict.fromkeys([*names, *(f"{NETWORK}.{name}" for name in FORMS["ungated"])])


def work_piece(
    run: Run,
    experiment: Experiment,
    work: Work,
    setting: Setting,
    start: list[str] | None,
) -> Piece:
    """Return the piece of work that scores a method on a task; nothing is computed.

    Args:
        run: Whose configuration it has.
        experiment: Truth and methods.
        work: Method, task and scope.
        setting: Of a classical method.
        start: Fingerprints of the networks of a form.
    """
    tuned = {f"setting.{name}": value for name, value in setting.items()}
    settings: dict[str, Any] = {**world_alone(run, experiment), "start": start, **tuned}
    return run.piece(work.method, None, {"task-": work.task, **dict(work.scope)}, **settings)


def fit_command(run: Run, form: str, seed: int) -> str:
    """Return the command that trains a network as ``evaluate`` looks for it."""
    changes = "".join(
        f" --model.network.{name} {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in FORMS[form].items()
        if run.settings.get(f"{NETWORK}.{name}") != value
    )
    name = "" if run.folder.name == run.config else f" --name {run.folder.name}"
    return (
        f"gates weather fit --config {run.config}{name} --seed_everything {seed} "
        f"--{SOURCE_SEED} {seed}{changes}"
    )


def untrained_rows(
    run: Run, networks: Networks, experiment: Experiment, densities: Sequence[float]
) -> list[Row]:
    """Return a row for every network that is missing, with the command that trains it."""
    if networks.pinned is not None:
        return []
    task, metric = experiment.tasks(densities)[0].name, f"rmse_{experiment.field}"
    missing = set(networks.store.missing(networks.pieces.values()))
    return [
        Row(form, task, metric, math.nan,
            note=f"seed {seed} is not trained: run `{fit_command(run, form, seed)}`")
        for (form, seed), piece in networks.pieces.items()
        if piece in missing
    ]  # fmt: skip


def complete(
    there: Collection[tuple[str, int]], seeds: tuple[int, ...], forms: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the seeds of which there is a network, and the forms of which there are all."""
    if forms:
        seeds = tuple(s for s in seeds if any(seed == s for _, seed in there))
    return seeds, tuple(f for f in forms if seeds and all((f, s) in there for s in seeds))


WEIGHTS, CHECKPOINT = "weights", ".ckpt"


class Training:
    """Trains networks of all forms with the configured model and data.

    Args:
        model: The module of the configuration.
        datamodule: Its data; the seed of the source is replaced.
    """

    def __init__(self, model: AdasModule, datamodule: AssimilationDataModule) -> None:
        self.model, self.datamodule = model, datamodule

    def prepare(self) -> None:
        """Make the data that are missing."""
        self.datamodule.progress = ticking
        self.datamodule.prepare_data()

    def train(self, piece: Piece, job: Job) -> AdasAnalysis:
        """Train one network as ``fit`` does.

        Raises:
            GatesError: The training is shorter than the interval of its validations.
        """
        interval, steps = piece.get("trainer.val_check_interval"), self.datamodule.steps
        if isinstance(interval, int) and interval > steps:
            raise GatesError(
                f"trainer.val_check_interval is {interval}, but there are {steps} steps: set it to "
                "that or less, or data.steps to more"
            )
        options = {name: piece.get(f"trainer.{name}") for name in TRAINER}
        options = {name: value for name, value in options.items() if value is not None}
        optimizer = {name: piece[f"model.{name}"] for name in OPTIMIZER_BOX}
        options |= {name: piece.get(f"checkpoint.{name}") for name in ("monitor", "mode")}
        job.note(objects=self.datamodule.training_objects())
        return self.fit(piece, job, optimizer, steps, **options)

    def fit(
        self, piece: Piece, job: Job, optimizer: Mapping[str, float], steps: int, **options: Any
    ) -> AdasAnalysis:
        """Return the network of a piece after some steps with a setting of the optimizer."""
        L.seed_everything(piece.seed, verbose=False)
        module = self.model.variant(piece.method, **optimizer).train()  # forecasts are shared
        source, data = copy.copy(self.datamodule.source), self.datamodule
        source.seed = piece.seed or 0
        own = AssimilationDataModule(
            source, steps, data.timelines, data.validation_steps, data.validation_timelines
        )
        job.fit(module, own, ticks="steps", **options)
        return module.analysis.eval()


class Networks:
    """Finds and loads the networks of an evaluation, in whatever process.

    Args:
        run: Whose configuration they have.
        optimizers: Tuned settings by form; those of the configuration where there are none.
        seeds: Seeds of the networks.
        tested: Short hashes of what they will be tested on.
        pinned: One network instead of all.
    """

    def __init__(
        self,
        run: Run,
        optimizers: Mapping[str, Mapping[str, float]],
        seeds: Sequence[int],
        tested: Sequence[str] = (),
        pinned: AdasAnalysis | None = None,
    ) -> None:
        self.store: Store[AdasAnalysis] = run.store(WEIGHTS, AnalysisForm())
        self.pieces = {
            (form, seed): network_piece(run, form, seed, optimizer)
            for form, optimizer in optimizers.items()
            for seed in seeds
        }
        self.tested, self.pinned = list(tested), pinned
        self._start = run.settings.get("start")

    def obtain(self, run: Run, training: Training, *, train: bool = True) -> list[tuple[str, int]]:
        """Train what is missing if it is to be trained; return the forms and seeds that exist."""
        if self.pinned is not None:
            return list(self.pieces)
        steps = training.datamodule.steps
        obtained = run.obtain(
            self.store, self.pieces.values(), training.train, ticks=steps,
            prepare=training.prepare, leave_out=not train,
        )  # fmt: skip
        return [key for key, piece in self.pieces.items() if piece in set(obtained)]

    def load(self, form: str, seed: int) -> AdasAnalysis:
        """Return a network in evaluation mode.

        Raises:
            GatesError: It is missing or damaged, or was trained on what it is to be tested on.
        """
        if self.pinned is not None:
            return self.pinned
        return self.store.load(self.pieces[form, seed], tested=self.tested)

    def start(self, form: str) -> list[str]:
        """Return the fingerprints of the networks that a correction of a form may start from."""
        if self.pinned is not None:
            return [str(self._start)]
        return [piece.fingerprint for (name, _), piece in self.pieces.items() if name == form]

    def path(self, form: str, seed: int) -> Path | None:
        """Return the file of a network, or None where there is none."""
        folder = self.store.find(self.pieces[form, seed])
        return None if folder is None else folder / AnalysisForm.FILE


def optimizers_of(
    run: Run, forms: Sequence[str], seeds: Sequence[int], tuned: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return the optimizer of every form: the tuned one, unless ``fit`` trained a network of it.

    The networks of a form share one setting. ``fit`` has that of the configuration, and what it
    trained is used.

    Args:
        run: The run.
        forms: Forms of Adas.
        seeds: Seeds of their networks.
        tuned: Choices by form.
    """
    configured = fitted(run, forms, seeds)
    optimizers = {}
    for form in forms:
        choice = None if form in configured else tuned.get(form)
        optimizers[form] = {} if choice is None else dict(choice.setting)
    return optimizers


def fitted(run: Run, forms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return the forms of which the run folder has a network of the configured optimizer."""
    store = run.store(WEIGHTS, AnalysisForm())
    return [f for f in forms if any(store.holds(network_piece(run, f, seed)) for seed in seeds)]


def pinned_network(
    path: Path, model: AdasModule, form: str | None, tested: Collection[str] = ()
) -> AdasAnalysis:
    """Return the network of a checkpoint or a file of weights, in evaluation mode.

    Args:
        path: What it was trained on stands in a checkpoint, and in the record of its folder.
        model: The module of the configuration.
        form: Form of its network, None if that is none of those that are compared.
        tested: Short hashes of what it will be tested on.

    Raises:
        GatesError: The configured network is not of a compared form, the file does not fit it, or
            was trained on what it is to be tested on.
    """
    if form is None:
        raise GatesError(
            f"the configured network is none of {', '.join(FORMS)}: set model.network.output "
            "and model.network.gated to those of one of them"
        )
    analysis = model.variant(form).analysis
    load_trained(path, analysis)
    records = [read_record(folder) for folder in path.resolve().parents[:2]]
    trained_on = {path for record in records if record is not None for path in record.objects}
    if path.suffix == CHECKPOINT:
        trained_on |= seen(load_checkpoint(path))
    if leaked := trained_on & set(tested):
        raise GatesError(
            f"{path} was trained on {len(leaked)} of the {len(set(tested))} test objects of this "
            "configuration: give a network that was trained on other data"
        )
    return analysis.eval()


def load_trained(path: Path, analysis: AdasAnalysis) -> None:
    """Read weights, or those of a checkpoint (``.ckpt``), into ``analysis``.

    Raises:
        GatesError: The file is missing, damaged, or belongs to another configuration.
    """
    if path.suffix != CHECKPOINT:
        load_weights(path, analysis)
        return
    prefix = "analysis."
    state = load_checkpoint(path).get("state_dict")
    if not isinstance(state, dict):
        raise GatesError(
            f"{path} is not a checkpoint of a training: give checkpoints/last.ckpt or best.ckpt of "
            "a run, or a file of its weights/"
        )
    weights = {
        str(n).removeprefix(prefix): v for n, v in state.items() if str(n).startswith(prefix)
    }
    take_weights(path, weights, analysis)
