"""The command lines of ``gates weather``: what follows from a user's store, and what is kept."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from apps.weather.networks import (
    NETWORK,
    NEUTRAL,
    WEIGHTS,
    correction_piece,
    fit_piece,
    load_trained,
)
from apps.weather.verbs import FUNCTIONS, TRAIN_FORECAST
from core_gates.errors import GatesError
from harness.command import GatesRunCLI
from harness.command.parser import describe
from harness.experiment import Piece, Run
from harness.files import sha256
from harness.files.piece import read_record
from harness.runs.callbacks import load_weights
from harness.runs.terminal import ticking
from weather.cycle import Forecast
from weather.experiments.osse.osse_experiment import kept_weights
from weather.experiments.osse.rivals import CORRECTIONS
from weather.experiments.reanalysis.source import ReanalysisSource
from weather.models.adas.analysis import (
    OWN,
    AdasAnalysis,
    AnalysisForm,
    read_analysis,
    read_header,
)
from weather.models.adas.presets import FORMS, network_shape
from weather.models.fengwu.trained_forecast import ForecastForm
from weather.operations.forecasts import find_forecast
from weather.training.correction_module import CorrectionModule
from weather.training.stream import AssimilationDataModule

CLASS_PATH = f"{ReanalysisSource.__module__}.{ReanalysisSource.__qualname__}"
FOLLOWS = 0  # a number of the network that follows from the store
FORECASTS = "forecasts"


def short_options() -> dict[str, str]:
    """Return options of the store by their short names: ``--data.store`` and the like."""
    parameters = inspect.signature(AssimilationDataModule).parameters
    names = [
        name for name in inspect.signature(ReanalysisSource).parameters if name not in parameters
    ]
    return {f"--data.{name}": f"--data.source.init_args.{name}" for name in names}


SOURCE_HELP = (
    "Where the problems come from. Options of --config reanalysis, a store in the schema of "
    f"WeatherBench 2: {', '.join(short_options())}."
)


def is_own_store(options: Any) -> bool:
    """Return whether the source of parsed options is a user's store."""
    return str(options["data"]["source"].get("class_path")) == CLASS_PATH


def fill_network(options: Any) -> None:
    """Replace zeros in the shape of the network by what follows from the store.

    Args:
        options: Of a verb, parsed; the store is opened.

    Raises:
        GatesError: There is no store, or it cannot be used.
    """
    network = options["model"]["network"]["init_args"]
    zeros = [name for name in ("grid_shape", "patch_size", "window_size", "kernel_sizes")
             if np.all(np.ravel(network[name]) == FOLLOWS)]  # fmt: skip
    if not zeros:
        return
    try:
        source = ReanalysisSource(**dict(options["data"]["source"]["init_args"]))
    except ValueError as error:
        raise GatesError(str(error)) from error
    channels = source.channels
    counts = len(channels.surface), len(channels.upper), len(channels.levels)
    shape = network_shape(source.grid.shape, *counts)
    if "grid_shape" in zeros:
        zeros += ["num_surface", "num_upper", "num_levels"]
    for name in zeros:
        value = shape[name]
        if isinstance(value, list):
            value = tuple(tuple(row) if isinstance(row, list) else row for row in value)
        network[name] = value


class WeatherCLI(GatesRunCLI):
    """The command line of verbs that have an assimilation network and its data."""

    app = "weather"
    verbs = ("prepare", "observe", "tune", "fit", "assimilate", "cycle", "evaluate", "report")
    other_verbs = (TRAIN_FORECAST, *FUNCTIONS)
    package = "weather"
    neutral = NEUTRAL

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add what ``fit`` needs to train a correction of interpolation."""
        super().add_arguments_to_parser(parser)
        if parser.verb == "fit":
            parser.add_argument(
                "--form",
                type=Literal[*CORRECTIONS] | None,
                help="Train a network in its own cycle as a correction of interpolation, with the "
                "problems of `osse`.",
            )
            parser.add_argument(
                "--start",
                type=str | None,
                help="Weights that the correction starts from, as a file; `networks` for those of "
                "--data.source.init_args.networks of the same seed. If null, a fresh network that "
                "also sees the increment of interpolation.",
            )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; ``--data.store X`` and the like are short for options of the user's own store."""
        for verb in self._wanted:
            describe(self._parser(verb), {"data.source": SOURCE_HELP})
        if isinstance(args, list):
            short, words = short_options(), [word.partition("=") for word in args]
            args = [short.get(option, option) + equals + value for option, equals, value in words]
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Take the shape of the network from the user's own store, and cache it in the run."""
        options = self.config[self.subcommand]
        ours = is_own_store(options)
        if ours:
            fill_network(options)
        super().before_instantiate_classes()
        if ours and options["data"]["source"]["init_args"].get("cache") is None:
            options["data"]["source"]["init_args"]["cache"] = str(self.run_folder.path / "cache")

    def after_instantiate_classes(self) -> None:
        """Refuse data that is damaged, or not that of the model, before a run folder is claimed."""
        source = self.datamodule.source
        if is_own_store(self.config[self.subcommand]):
            source.find_model = self._background
        if self.subcommand == "fit":
            if self._form:
                self._train_correction()
            self.model.check_source(source)
            if hasattr(source, "check"):
                source.check()
            self.datamodule.progress = ticking
        super().after_instantiate_classes()

    @property
    def _form(self) -> str | None:
        """Form of the correction that is trained."""
        return self.config[self.subcommand].get("form")

    def settings(self) -> dict[str, Any]:
        """Return all that decides a result; the start of a correction by content and shape."""
        settings, start = super().settings(), self._start()
        if start is None:
            return settings | {"start": None} if self._form else settings
        arguments = read_header(start)["form"] | {"drop_path": 0.0}
        given = {f"model.{n}" if n in OWN else f"{NETWORK}.{n}": v for n, v in arguments.items()}
        given = {name: value for name, value in given.items() if name in settings}
        return settings | given | {"start": sha256(start)[:16]}

    def _seen_before(self) -> set[str]:
        """Return what a checkpoint, or the start of a correction, was trained on."""
        start = self._start()
        record = None if start is None else read_record(start.parent)
        return super()._seen_before() | set(record.objects if record else ())

    def _start(self) -> Path | None:
        """Return the weights that a correction starts from; None for a fresh network.

        Raises:
            GatesError: There is no such file or no record of its training, it is a network of
                another form, or no correction is trained.
        """
        options = self.config[self.subcommand]
        given = options.get("start")
        if self.subcommand != "fit" or given is None:
            return None
        if not self._form:
            raise GatesError(
                "--start is for a correction of interpolation: add --form, or give --ckpt_path"
            )
        if given == "networks":
            path = kept_weights(str(options["data"]["source"]["init_args"].get("networks")))
            path /= f"{CORRECTIONS[self._form]}-s{options['seed_everything']}"
            path /= AnalysisForm.FILE
        else:
            path = Path(given)
        if not path.is_file():
            raise GatesError(
                f"--start {given} names no weights: give the file of a network, or `networks`"
            )
        if read_record(path.parent) is None:
            raise GatesError(
                f"--start {given} lies in no folder of results: its record.json must say what it "
                "was trained on"
            )
        header, wanted = read_header(path)["form"], FORMS[CORRECTIONS[self._form]]
        if wrong := [f"{n} {header.get(n)}" for n, v in wanted.items() if header.get(n) != v]:
            raise GatesError(
                f"--start {given} is a network with {', '.join(wrong)}: {self._form} starts from "
                f"one of the form {CORRECTIONS[self._form]}"
            )
        return path

    def _start_weights(self) -> AdasAnalysis | None:
        """Return the network that a correction starts from; None for a fresh one."""
        path = self._start()
        return None if path is None else read_analysis(path)

    def _train_correction(self) -> None:
        """Train a correction of interpolation in place of the configured network."""
        source, options = self.datamodule.source, self.config[self.subcommand]
        if options.get("ckpt_path"):
            raise GatesError("--form starts from --start, not from --ckpt_path: give one of them")
        if not hasattr(source, "train_correction"):
            raise GatesError(
                f"--form {self._form} needs the problems of a sealed world: add --config osse"
            )
        source.train_correction(self._form, options["seed_everything"], self.datamodule.timelines)
        start = self._start_weights()
        if start is None:
            self.model = CorrectionModule.fresh(self.model, CORRECTIONS[str(self._form)])
        else:
            self.model = CorrectionModule.of(self.model, start)

    def _background(self, name: str) -> Forecast:
        """Return the forecast model of a name that makes backgrounds.

        Raises:
            GatesError: There is no such model, or it cannot be made.
        """
        try:
            return find_forecast(name, self.model, self.datamodule.source.channels).forecast
        except GatesError as error:
            raise GatesError(str(error).replace("--forecast", "--data.background", 1)) from error

    def training(self, run: Run) -> Piece:
        """Return the network of a form and a seed, or a separate piece for any other."""
        if self._form:
            return correction_piece(run, self._form)
        return fit_piece(run) or super().training(run)

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Path) -> Path:
        """Keep the best or last weights where ``evaluate`` and ``assimilate`` find them."""
        load_trained(path, self.model.analysis)
        facts = self._against_start() if self._form else {}
        store = run.store(WEIGHTS, AnalysisForm())
        return store.keep(piece, self.model.analysis, objects=objects, **facts) / AnalysisForm.FILE

    def _against_start(self) -> dict[str, Any]:
        """Return and print the error of a correction over that of what it started from."""
        start, trained = self._start_weights(), self.model.analysis.eval()
        for weight in trained.network.parameters():
            weight.data = weight.data.bfloat16().to(weight)  # as they are kept
        gain = self.datamodule.source.over_start(trained, start, ticking)
        verdict = "better" if gain.high < 1 else "worse" if gain.low > 1 else "not better"
        what = "interpolation" if start is None else "its start"
        print(
            f"{self._form} over {what} in {gain.n} cycles of validation, {gain.task}: "
            f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}], {verdict}"
        )
        return {"over_start": [gain.value, gain.low, gain.high]}


class ForecastCLI(GatesRunCLI):
    """The command line of ``train-forecast``, a training with a module and data of its kind."""

    app = "weather"
    verbs = ("fit",)
    trains = frozenset({"fit", TRAIN_FORECAST})
    package = "weather"
    neutral = NEUTRAL

    def after_instantiate_classes(self) -> None:
        """Refuse data that is damaged, or not that of the model, before a run folder is claimed."""
        self.model.check_source(self.datamodule.source)
        self.datamodule.source.check()
        self.datamodule.progress = ticking
        super().after_instantiate_classes()

    def training(self, run: Run) -> Piece:
        """Return the piece of the forecast model."""
        return run.piece("fengwu", run.settings.get("seed"))

    def keep(self, run: Run, piece: Piece, objects: Sequence[str], path: Path) -> Path:
        """Keep the best or last weights as a file that ``--forecast`` takes."""
        self.model.load_state_dict(load_weights(path)["state_dict"])
        self.model.forecast.channels = self.datamodule.source.channels
        store = run.store(FORECASTS, ForecastForm())
        return store.keep(piece, self.model.forecast, objects=objects) / ForecastForm.FILE
