"""The command lines of ``gates weather``: what follows from a user's store, and what is kept."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.weather.networks import NEUTRAL, WEIGHTS, fit_piece, load_trained
from apps.weather.verbs import FUNCTIONS, TRAIN_FORECAST
from core_gates.errors import GatesError
from harness.command import GatesRunCLI
from harness.command.parser import describe
from harness.experiment import Piece, Run
from harness.runs.callbacks import load_weights
from harness.runs.terminal import ticking
from weather.cycle import Forecast
from weather.experiments.reanalysis.source import ReanalysisSource
from weather.models.adas.analysis import AnalysisForm
from weather.models.adas.presets import network_shape
from weather.models.fengwu.trained_forecast import ForecastForm
from weather.operations.forecasts import find_forecast
from weather.training.stream import AssimilationDataModule

CLASS_PATH = f"{ReanalysisSource.__module__}.{ReanalysisSource.__qualname__}"
FOLLOWS = 0  # a number of the network that follows from the store
FORECASTS = "forecasts"


def short_options() -> dict[str, str]:
    """Return options of the store by their short names: ``--data.store`` and the like."""
    own = inspect.signature(AssimilationDataModule).parameters
    names = [name for name in inspect.signature(ReanalysisSource).parameters if name not in own]
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

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse; ``--data.store X`` and the like are short for options of the user's own store."""
        for verb in self._wanted:
            describe(self._parser(verb), {"data.source": SOURCE_HELP})
        if isinstance(args, list):
            known, words = short_options(), [word.partition("=") for word in args]
            args = [known.get(option, option) + equals + value for option, equals, value in words]
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Take the shape of the network from the user's own store, and cache it in the run."""
        options = self.config[self.subcommand]
        own = is_own_store(options)
        if own:
            fill_network(options)
        super().before_instantiate_classes()
        if own and options["data"]["source"]["init_args"].get("cache") is None:
            options["data"]["source"]["init_args"]["cache"] = str(self.run_folder.path / "cache")

    def after_instantiate_classes(self) -> None:
        """Refuse data that is damaged, or not that of the model, before a run folder is claimed."""
        source = self.datamodule.source
        if is_own_store(self.config[self.subcommand]):
            source.find_model = self._background
        if self.subcommand == "fit":
            self.model.check_source(source)
            if hasattr(source, "check"):
                source.check()
            self.datamodule.progress = ticking
        super().after_instantiate_classes()

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
        return fit_piece(run) or super().training(run)

    def keep(self, run: Run, piece: Piece, objects: Sequence[str]) -> Path | None:
        """Keep the best or last weights where ``evaluate`` and ``assimilate`` find them."""
        path = self.run_folder.best_checkpoint or self.run_folder.last_checkpoint
        if path is None:
            return None
        load_trained(path, self.model.analysis)
        store = run.store(WEIGHTS, AnalysisForm())
        return store.keep(piece, self.model.analysis, objects=objects) / AnalysisForm.FILE


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

    def keep(self, run: Run, piece: Piece, objects: Sequence[str]) -> Path | None:
        """Keep the best or last weights as a file that ``--forecast`` takes."""
        path = self.run_folder.best_checkpoint or self.run_folder.last_checkpoint
        if path is None:
            return None
        self.model.load_state_dict(load_weights(path)["state_dict"])
        self.model.forecast.channels = self.datamodule.source.channels
        store = run.store(FORECASTS, ForecastForm())
        return store.keep(piece, self.model.forecast, objects=objects) / ForecastForm.FILE
