"""A forecast model by name: that of the configuration, or any callable of the user."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from torch import Tensor

from core_gates.errors import GatesError
from weather.cycle import Forecast
from weather.training.module import AdasModule


def find_forecast(name: str, model: AdasModule) -> Forecast:
    """Return a forecast model ``(states (N,C,H,W), hours) -> states`` whose results are checked.

    Args:
        name: ``model`` for the first forecast model of the configuration, a class path such as
            ``package.module.Model``, or a file and a name in it, ``my_model.py:Model``. A class is
            called without arguments, anything else is taken as it is.
        model: The module of the configuration.

    Raises:
        GatesError: There is no such model, or it cannot be made or called.
    """
    if name == "model":
        if not len(model.forecasts):
            raise GatesError(
                "--forecast model: this configuration has none, give the class path of another one"
            )
        return _checked(model.forecasts[0], name)
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
    """Refuse results of another shape and results that are not finite."""

    def run(states: Tensor, hours: float) -> Tensor:
        following = forecast(states, hours)
        shape = tuple(getattr(following, "shape", ()))
        if shape != tuple(states.shape):
            raise GatesError(
                f"--forecast {name!r} returned the shape {shape}, expected {tuple(states.shape)}: "
                "it maps (states, hours) to states of the same shape"
            )
        if not following.isfinite().all():
            raise GatesError(
                f"--forecast {name!r} returned values that are not finite after {hours:g} h: check "
                "its units, the states come in those of the background"
            )
        return following

    return run
