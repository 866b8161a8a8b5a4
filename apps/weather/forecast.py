"""A forecast model by name: that of the configuration, or any callable of the user."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from torch import Tensor

from core_gates.errors import GatesError
from weather.cycle import Forecast, FramesForecast, advance
from weather.models.fengwu.form import ForecastForm, load_forecast
from weather.models.fengwu.published import PublishedForecast
from weather.state import ChannelSpec
from weather.training.module import AdasModule


def find_forecast(name: str, model: AdasModule, channels: ChannelSpec) -> Forecast:
    """Return a forecast model ``(states (N,C,H,W), hours) -> states`` whose results are checked.

    Args:
        name: ``model`` for the first forecast model of the configuration; a file of
            ``train-forecast``; an ONNX file in the layout of FengWu, next
            to its ``data_mean.npy`` and ``data_std.npy``; a class path such as
            ``package.module.Model``, or a file and a name in it, ``my_model.py:Model``. A class is
            called without arguments, anything else is taken as it is.
        model: The module of the configuration.
        channels: Channels of the states.

    Raises:
        GatesError: There is no such model, or it cannot be made or called.
    """
    if name == "model":
        if not len(model.forecasts):
            raise GatesError(
                "--forecast model: this configuration has none, give the class path of another one"
            )
        return _checked(model.forecasts[0], name)
    if name.endswith(ForecastForm.SUFFIX):
        return _checked(load_forecast(name), name)
    if name.endswith(".onnx"):
        return _checked(PublishedForecast(name, channels), name)
    file, colon, attribute = name.rpartition(":")
    try:
        if colon:
            module = _from_file(Path(file))
        else:
            file, _, attribute = name.rpartition(".")
            module = importlib.import_module(file)
        found = getattr(module, attribute)
        forecast = found() if isinstance(found, type) else found
    except Exception as error:  # a user's module may fail in any way
        raise GatesError(
            f"--forecast {name!r} cannot be imported ({type(error).__name__}: {error}), expected "
            "a class path such as package.module.Model, or my_model.py:Model"
        ) from error
    if not callable(forecast):
        raise GatesError(f"--forecast {name!r} is no callable (states, hours) -> states: name one")
    return _checked(forecast, name)


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(forecast: Forecast, name: str) -> Forecast:
    """Return the same model, of one frame or of two, with results that are checked."""
    return (
        _CheckedFrames(forecast, name)
        if isinstance(forecast, FramesForecast)
        else _Checked(forecast, name)
    )


class _Checked:
    """Refuses results of another shape and results that are not finite."""

    def __init__(self, forecast: Forecast, name: str) -> None:
        self.forecast, self.name = forecast, name

    def __call__(self, states: Tensor, hours: float, previous: Tensor | None = None) -> Tensor:
        try:
            following = advance(self.forecast, states, hours, previous)
        except ValueError as error:  # such as a grid that is not that of the model
            raise GatesError(
                f"--forecast {self.name!r} refuses the states ({error}): name a model of their "
                "channels, grid and time step"
            ) from error
        shape = tuple(getattr(following, "shape", ()))
        if shape != tuple(states.shape):
            raise GatesError(
                f"--forecast {self.name!r} returned the shape {shape}, expected "
                f"{tuple(states.shape)}: it maps (states, hours) to states of the same shape"
            )
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
