"""A forecast model by name: that of the configuration, or any callable of the user."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from core_gates.errors import GatesError
from harness.files import sha256
from weather.cycle import Forecast, FramesForecast, advance
from weather.grid import Grid
from weather.models.fengwu.published import PublishedForecast
from weather.models.fengwu.trained_forecast import ForecastForm, load_forecast
from weather.state import FENGWU, ChannelSpec

if TYPE_CHECKING:
    from weather.training.adas_module import AdasModule


BUILT_IN = {
    "shallow_water": "weather.models.shallow_water.model.ShallowWater",
    "held_suarez": "weather.models.held_suarez.model.HeldSuarez",
}
CONFIGURED = "model"
NO_FORECAST = "--forecast model: this configuration has none, give the class path of another one"


class NamedForecast(NamedTuple):
    """A forecast model, with what is known of it.

    Attributes:
        forecast: ``(states (N,C,H,W), hours) -> states``, whose results are checked.
        channels: Channels of its states; None where the model does not know them.
        grid: Their grid; None where the model does not know it.
        facts: Name, description and SHA-256 of its file, by the names of attributes.
    """

    forecast: Forecast
    channels: ChannelSpec | None
    grid: Grid | None
    facts: dict[str, str]


def find_forecast(name: str, model: AdasModule | None, channels: ChannelSpec) -> NamedForecast:
    """Return a forecast model of some channels.

    Args:
        name: ``model`` for the first forecast model of the configuration, or see
            :func:`named_forecast`.
        model: The module of the configuration.
        channels: Channels of the states.

    Raises:
        GatesError: There is no such model, it cannot be made or called, or is made for other
            channels.
    """
    if name == CONFIGURED:
        if model is None or not len(model.forecasts):
            raise GatesError(NO_FORECAST)
        return described(model.forecasts[0], name)
    found = named_forecast(name, channels)
    if found.channels not in (None, channels):
        raise GatesError(
            f"--forecast {name!r} forecasts {', '.join(found.channels.labels)}, expected "
            f"{', '.join(channels.labels)}: name a model of these channels"
        )
    return found


def named_forecast(
    name: str,
    channels: ChannelSpec | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> NamedForecast:
    """Return a forecast model by its name alone.

    Args:
        name: ``shallow_water`` or ``held_suarez`` for a model of the package; a file of
            ``train-forecast`` or a run folder of it; an ONNX file in the layout of FengWu, next to
            its ``data_mean.npy`` and ``data_std.npy``; a class path such as
            ``package.module.Model``, or a file and a name in it, ``my_model.py:Model``. A class is
            called, anything else is taken as it is.
        channels: Channels of an ONNX file; those of FengWu if None.
        arguments: Arguments of a class.

    Raises:
        GatesError: There is no such model, or it cannot be made or called.
    """
    path = Path(name)
    if path.is_dir():
        own = path / ForecastForm.FILE
        files = [own] if own.is_file() else sorted(path.glob(f"forecasts/*/{ForecastForm.FILE}"))
        if len(files) != 1:
            what = f"{len(files)} forecast models" if files else "no forecast model"
            raise GatesError(
                f"{path} holds {what}, expected one of `gates weather train-forecast`: name the "
                f"file {ForecastForm.FILE} itself"
            )
        path = files[0]
    if path.suffix in (ForecastForm.SUFFIX, ".onnx"):
        if arguments:
            raise GatesError(f"--forecast_arguments belong to a class, {name} is a file")
        if path.suffix == ".onnx":
            return described(PublishedForecast(path, channels or FENGWU), name, path)
        return described(load_forecast(path), name, path)
    file, colon, _ = name.rpartition(":")
    model = _imported(BUILT_IN.get(name, name), dict(arguments or {}))
    return described(model, name, Path(file) if colon else None)


def described(model: Any, name: str, path: Path | None = None) -> NamedForecast:
    """Return a model with what its attributes tell."""
    facts = {"forecast": name}
    if description := getattr(model, "description", ""):
        facts["forecast_model"] = str(description)
    if path is not None:
        facts["forecast_sha256"] = sha256(path)
    channels, grid = (getattr(model, part, None) for part in ("channels", "grid"))
    checked = _CheckedFrames if isinstance(model, FramesForecast) else _Checked
    return NamedForecast(
        checked(model, name),
        channels if isinstance(channels, ChannelSpec) else None,
        grid if isinstance(grid, Grid) else None,
        facts,
    )


def _imported(name: str, arguments: dict[str, Any]) -> Forecast:
    """Return what a class path or a file and a name stand for; a class is called."""
    file, colon, attribute = name.rpartition(":")
    try:
        if colon:
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            if spec is None or spec.loader is None:
                raise ImportError(f"{file} is no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            file, _, attribute = name.rpartition(".")
            module = importlib.import_module(file)
        found = getattr(module, attribute)
        forecast: Forecast = found(**arguments) if isinstance(found, type) else found
    except Exception as error:  # a user's module may fail in any way
        raise GatesError(
            f"--forecast {name!r} cannot be imported ({type(error).__name__}: {error}), expected "
            "a class path such as package.module.Model, or my_model.py:Model"
        ) from error
    if not callable(forecast):
        raise GatesError(f"--forecast {name!r} is no callable (states, hours) -> states: name one")
    return forecast


class _Checked:
    """Refuses results of another shape and results that are not finite."""

    def __init__(self, forecast: Forecast, name: str) -> None:
        self.forecast, self.name = forecast, name

    def __call__(self, states: Tensor, hours: float, previous: Tensor | None = None) -> Tensor:
        try:
            following = advance(self.forecast, states, hours, previous)
        except GatesError:
            raise
        except Exception as error:  # a grid that is not that of the model, or a fault of the user's
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = (str(error).splitlines() or [""])[0]
            raise GatesError(
                f"--forecast {self.name!r} refuses the states ({kind}{reason}): name a model of "
                "their channels, grid and time step"
            ) from error
        shape = tuple(getattr(following, "shape", ()))
        if shape != tuple(states.shape):
            raise GatesError(
                f"--forecast {self.name!r} returned the shape {shape}, expected "
                f"{tuple(states.shape)}: it maps (states, hours) to states of the same shape"
            )
        following = following.to(states)
        if not following.isfinite().all():
            raise GatesError(
                f"--forecast {self.name!r} returned values that are not finite after {hours:g} h: "
                "check its units, the states come in those of the background"
            )
        return following


class _CheckedFrames(_Checked):
    """The same for a model that starts from two states."""

    def __init__(self, forecast: FramesForecast, name: str) -> None:
        super().__init__(forecast, name)
        self.frames, self.step_hours = forecast.frames, forecast.step_hours
