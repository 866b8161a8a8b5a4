"""What of a configuration follows from the user's own store."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.weather.forecast import find_forecast
from core_gates.errors import GatesError
from weather.cycle import Forecast
from weather.experiments.reanalysis.source import ReanalysisSource
from weather.models.adas.shape import network_shape
from weather.state import ChannelSpec
from weather.training.module import AdasModule
from weather.training.stream import AssimilationDataModule

CLASS_PATH = f"{ReanalysisSource.__module__}.{ReanalysisSource.__qualname__}"
FOLLOWS = 0  # a number of the network that follows from the store


def short_options() -> dict[str, str]:
    """Return options of the store by their short names: ``--data.store`` and the like."""
    own = inspect.signature(AssimilationDataModule).parameters
    names = [name for name in inspect.signature(ReanalysisSource).parameters if name not in own]
    return {f"--data.{name}": f"--data.source.init_args.{name}" for name in names}


SOURCE_HELP = (
    "Where the problems come from. Options of --config reanalysis, a store in the schema of "
    f"WeatherBench 2: {', '.join(short_options())}."
)


def lengthened(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with short names of options in full."""
    known = short_options()
    found = []
    for word in words:
        option, equals, value = word.partition("=")
        found.append(f"{known.get(option, option)}{equals}{value}")
    return found


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
             if _is_zero(network[name])]  # fmt: skip
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
        network[name] = tuple(map(_tuple, value)) if isinstance(value, list) else value


def fill_cache(options: Any, folder: Path) -> None:
    """Put the cache into the run folder unless another place is configured."""
    source = options["data"]["source"]["init_args"]
    if source.get("cache") is None:
        source["cache"] = str(folder / "cache")


def named_background(name: str, model: AdasModule, channels: ChannelSpec) -> Forecast:
    """Return the forecast model that makes backgrounds, see `apps.weather.forecast.find_forecast`.

    Raises:
        GatesError: There is no such model, or it cannot be made.
    """
    try:
        return find_forecast(name, model, channels)
    except GatesError as error:
        raise GatesError(str(error).replace("--forecast", "--data.background", 1)) from error


def _is_zero(value: Any) -> bool:
    flat = [one for row in value for one in (row if isinstance(row, Sequence) else (row,))]
    return all(one == FOLLOWS for one in flat)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
