"""Forecasts from analyses, by a model of the configuration or of the user, streamed to a store."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import remove, resuming, sha256
from weather.cycle import Forecast, FramesForecast, advance
from weather.data.axes import dataset_grid, to_tensor
from weather.data.store import naming, open_wb2, require_grid
from weather.data.writing import StreamedStore, create_states
from weather.grid import Grid
from weather.models.fengwu.published import PublishedForecast
from weather.models.fengwu.trained_forecast import ForecastForm, load_forecast
from weather.progress import Progress, silent
from weather.state import FENGWU, SHORT_NAMES, ChannelSpec

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
            `named_forecast`.
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
    forecast = named_forecast(name, channels)
    if forecast.channels not in (None, channels):
        raise GatesError(
            f"--forecast {name!r} forecasts {', '.join(forecast.channels.labels)}, expected "
            f"{', '.join(channels.labels)}: name a model of these channels"
        )
    return forecast


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
        in_folder = path / ForecastForm.FILE
        files = (
            [in_folder]
            if in_folder.is_file()
            else sorted(path.glob(f"forecasts/*/{ForecastForm.FILE}"))
        )
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
        factory = getattr(module, attribute)
        forecast: Forecast = factory(**arguments) if isinstance(factory, type) else factory
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


OF_ANALYSES = (
    "method", "weights_sha256", "background_error", "used_cells", "rejected_cells", "revision",
)  # fmt: skip
"""Attributes of the analyses that their forecasts keep."""


class Leads(NamedTuple):
    """Hours of forecasts: 0, ``every``, and so on up to ``hours``.

    Attributes:
        hours: Length of a forecast.
        every: Hours between two states that are written.
    """

    hours: float
    every: float

    def check(self, forecast: Forecast) -> None:
        """Refuse leads that a model cannot forecast.

        Raises:
            GatesError: A number is not positive, or they do not fit together or to the model.
        """
        if not (self.every > 0 and self.hours > 0) or self.hours % self.every:
            raise GatesError(
                f"--hours {self.hours:g} --every {self.every:g} cannot be used: give positive "
                "hours, the first a multiple of the second"
            )
        if isinstance(forecast, FramesForecast) and self.every % forecast.step_hours:
            raise GatesError(
                f"--every {self.every:g} is no multiple of the {forecast.step_hours:g} h that the "
                "model steps: give one"
            )

    @property
    def deltas(self) -> np.ndarray:
        """Return all leads, timedelta64[ns]."""
        count = round(self.hours / self.every) + 1
        nanoseconds = np.rint(np.arange(count) * self.every * 3.6e12).astype(np.int64)
        return nanoseconds.astype("timedelta64[ns]")


class Forecasts(NamedTuple):
    """What was written.

    Attributes:
        channels: Channels of the states.
        starts: Times of the analyses.
        alone: Those of them of which a model of two frames had one alone.
    """

    channels: ChannelSpec
    starts: list[np.datetime64]
    alone: list[np.datetime64]


def forecast_store(
    analyses: str,
    model: NamedForecast,
    leads: Leads,
    path: Path,
    *,
    start: Sequence[str] = ("last",),
    settings: Mapping[str, Any] | None = None,
    made_by: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Forecasts:
    """Forecast from analyses of a store, see `write_forecasts`.

    Args:
        analyses: WeatherBench-2 store.
        model: The model; one that names no channels is given all fields of the store.
        leads: Length and interval.
        path: Store that is written.
        start: Times of the analyses, ``first``, ``last`` or ``all``.
        settings: What else decides the forecasts, such as arguments of the model.
        made_by: Further attributes of the store.
        overwrite: Replace an existing store.
        progress: Shows how far the work is.

    Raises:
        GatesError: The store holds forecasts, is on another grid than the model or lacks a start,
            or see `write_forecasts`.
    """
    leads.check(model.forecast)
    with open_wb2(analyses, model.channels) as dataset:
        if "prediction_timedelta" in dataset.dims:
            raise GatesError(f"{analyses} holds forecasts: select one prediction_timedelta")
        if model.grid is not None:
            require_grid(analyses, dataset_grid(dataset), model.grid, "the forecast model")
        channels = model.channels or store_channels(dataset)
        starts = choose_starts(dataset, start, analyses)
        period = [str(dataset["time"].values[n]) for n in (0, -1)]
        source = {"analyses": analyses, **model.facts}
        kept = {f"analysis_{n}": dataset.attrs[n] for n in OF_ANALYSES if n in dataset.attrs}
        title = {"title": "Forecasts by gates weather forecast", "method": "forecast"}
        alone = write_forecasts(
            dataset, channels, model.forecast, leads, path, starts=starts,
            settings={**source, **(settings or {}), "period": period},
            attributes={**title, **source, **kept, **(made_by or {})},
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    return Forecasts(channels, starts, alone)


def store_channels(dataset: xr.Dataset) -> ChannelSpec:
    """Return all fields of a store as channels.

    Variables that are known come in the order of FengWu, then the others by their names; levels
    ascend.

    Args:
        dataset: Opened by `weather.data.store.open_wb2`.
    """
    ordered = [name for name in SHORT_NAMES if name in dataset]
    names = ordered + sorted(str(name) for name in dataset.data_vars if name not in ordered)
    upper = tuple(name for name in names if "level" in dataset[name].dims)
    levels = tuple(int(level) for level in dataset["level"].values) if upper else ()
    return ChannelSpec(tuple(name for name in names if name not in upper), upper, levels)


def write_forecasts(
    analyses: xr.Dataset,
    channels: ChannelSpec,
    forecast: Forecast,
    leads: Leads,
    path: Path,
    *,
    starts: Sequence[np.datetime64],
    settings: Mapping[str, Any],
    attributes: Mapping[str, Any],
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[np.datetime64]:
    """Forecast from every start and write each state as it is made.

    The state at lead 0 is the analysis. A model of two frames is given the analysis one step
    earlier where the store has it. A call that is killed is continued by the same call.

    Args:
        analyses: Opened by `weather.data.store.open_wb2` with these channels.
        channels: Channels of the model.
        forecast: The model; refuses what is not finite.
        leads: Length and interval.
        path: Store that is written.
        starts: Times of the analyses.
        settings: What else decides the forecasts.
        attributes: Of the store.
        overwrite: Replace an existing store.
        progress: Shows how far the work is.

    Returns:
        The starts of which a model of two frames had one alone.

    Raises:
        GatesError: The leads do not fit the model, a state is not finite, or the path is taken.
    """
    leads.check(forecast)
    times, deltas = np.array(starts, "datetime64[ns]"), leads.deltas
    stamps, members = np.datetime_as_string(times, unit="s"), analyses.sizes.get("number")
    made = {"starts": stamps.tolist(), **leads._asdict(), "channels": list(channels.labels)}
    with resuming(path, {**settings, **made}, overwrite=overwrite) as partial:
        if not partial.state:
            remove(partial.content)
            grid = dataset_grid(analyses)
            create_states(partial.content, channels, grid, times=times, leads=deltas,
                          members=members, attributes=attributes)  # fmt: skip
        done, store = partial.state.get("starts", 0), StreamedStore(partial.content)
        with progress("forecasting", len(starts) * len(deltas)) as tick, torch.no_grad():
            for _ in range(done * len(deltas)):
                tick()
            for number in range(done, len(starts)):
                frames = _frames(analyses, channels, forecast, times[number])
                for lead, states in enumerate(_rollout(forecast, leads, *frames, stamps[number])):
                    store.write_states(states if members else states[0], channels, (number, lead))
                    tick()
                partial.save({"starts": number + 1})
    two = isinstance(forecast, FramesForecast)
    return [start for start in times if two and _earlier(analyses, forecast, start) is None]


def _frames(
    analyses: xr.Dataset, channels: ChannelSpec, forecast: Forecast, start: np.datetime64
) -> tuple[Tensor, Tensor | None]:
    """Return the states (N,C,H,W) at a start, and those one step earlier where they are known."""

    def at(time: np.datetime64) -> Tensor:
        states = to_tensor(analyses.sel(time=[time]), channels)[0]
        return states if states.ndim == 4 else states[None]

    earlier = _earlier(analyses, forecast, start)
    return at(start), None if earlier is None else at(earlier)


def _earlier(
    analyses: xr.Dataset, forecast: Forecast, start: np.datetime64
) -> np.datetime64 | None:
    """Return the time one step before a start, if the model wants it and the store has it."""
    if not isinstance(forecast, FramesForecast):
        return None
    time = start - np.timedelta64(round(forecast.step_hours * 3600), "s")
    return time if time in analyses["time"].values else None


def _rollout(
    forecast: Forecast, leads: Leads, states: Tensor, previous: Tensor | None, stamp: str
) -> Iterator[Tensor]:
    """Yield the states at every lead, the first of which is the analysis."""
    step = forecast.step_hours if isinstance(forecast, FramesForecast) else leads.every
    yield states
    for number in range(1, round(leads.hours / leads.every) + 1):
        for _ in range(round(leads.every / step)):
            try:
                following = advance(forecast, states, step, previous)
            except GatesError as error:
                raise GatesError(
                    f"forecast of {stamp}, hour {(number - 1) * leads.every:g} to "
                    f"{number * leads.every:g}: {error}"
                ) from error
            previous, states = states, following
        yield states


def choose_starts(
    analyses: xr.Dataset, wanted: Sequence[str], source: str | os.PathLike[str]
) -> list[np.datetime64]:
    """Return times of a store: ``first``, ``last``, ``all``, or any by their text.

    Raises:
        GatesError: One is unreadable, is not in the store, or is given twice.
    """
    times = analyses["time"].values
    words = {"first": times[:1], "last": times[-1:], "all": times}
    chosen: list[np.datetime64] = []
    with naming(source):
        for text in wanted:
            if text in words:
                chosen += list(words[text])
                continue
            try:
                time = np.datetime64(text.rstrip("Z"), "ns")
            except ValueError as error:
                raise GatesError(
                    f"--start {text!r} is no time, write it as 2017-01-01T00:00"
                ) from error
            if time not in times:
                first, last = (np.datetime_as_string(times[n], unit="m") for n in (0, -1))
                raise GatesError(
                    f"has no analysis of {text}, {len(times)} from {first} to {last}: give one of "
                    "them with --start, or first, last or all"
                )
            chosen.append(time)
    if len(set(chosen)) < len(chosen) or not chosen:
        raise GatesError(f"--start {list(wanted)} names a time twice, or none: give each once")
    return chosen
