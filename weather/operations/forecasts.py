"""Forecasts from analyses, streamed to a store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import remove, resuming
from weather.cycle import Forecast, FramesForecast, advance
from weather.data.store import naming, open_wb2, require_grid
from weather.data.tensors import dataset_grid, to_tensor
from weather.data.writing import StreamedStore, create_states
from weather.operations.named_forecasts import NamedForecast
from weather.progress import Progress, silent
from weather.state import SHORT_NAMES, ChannelSpec

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
    """Forecast from analyses of a store, see :func:`write_forecasts`.

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
            or see :func:`write_forecasts`.
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
    known = [name for name in SHORT_NAMES if name in dataset]
    names = known + sorted(str(name) for name in dataset.data_vars if name not in known)
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
        done = partial.state.get("starts", 0)
        store = StreamedStore(partial.content)
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
    found: list[np.datetime64] = []
    with naming(source):
        for text in wanted:
            if text in words:
                found += list(words[text])
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
            found.append(time)
    if len(set(found)) < len(found) or not found:
        raise GatesError(f"--start {list(wanted)} names a time twice, or none: give each once")
    return found
