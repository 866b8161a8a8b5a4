"""``gates weather forecast``: forecasts from analyses, as a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from apps.weather.forecast import (
    CONFIGURED,
    NO_FORECAST,
    NamedForecast,
    named_forecast,
)
from core_gates.errors import GatesError
from harness.command.configfile import read_config
from harness.command.verbs import Place
from harness.files import require_apart, require_free
from harness.runs.environment import made_by
from harness.runs.ticker import ticking
from weather.data.grids import require_grid
from weather.data.tensors import dataset_grid
from weather.data.wb2 import open_wb2
from weather.operations.forecasts import (
    Leads,
    choose_starts,
    store_channels,
    write_forecasts,
)
from weather.state import ChannelSpec

OF_ANALYSES = (
    "method", "weights_sha256", "background_error", "used_cells", "rejected_cells", "revision",
)  # fmt: skip
"""Attributes of the analyses that their forecasts keep."""


def forecast(
    place: Place,
    analyses: str,
    forecast: str = CONFIGURED,
    forecast_arguments: dict[str, Any] | None = None,
    start: tuple[str, ...] = ("last",),
    hours: float = 240.0,
    every: float = 6.0,
    output: str = "forecast.zarr",
    overwrite_output: bool = False,
) -> None:
    """Forecast from analyses of the store ANALYSES and write the states as a WeatherBench-2 store.

    ANALYSES is what `assimilate` or `cycle` wrote, or any reanalysis with the channels and the grid
    of the model; members of an ensemble are forecast together. States are written as they are
    made; a call that is killed is continued by the same call.

    Args:
        place: Filled in by the command line.
        analyses: Filled in by the command line.
        forecast: ``model`` for the first forecast model of the configuration; ``shallow_water`` or
            ``held_suarez``; a run folder or a file of ``train-forecast``; an ONNX file in the
            layout of FengWu; or any callable ``(states, hours) -> states`` as
            ``package.module.Model`` or ``my_model.py:Model``. Its attribute ``channels`` names the
            fields that it takes; without it, it is given all of the store.
        forecast_arguments: Arguments of the class of the model, ``{"truncation": 42}``.
        start: Times of the analyses from which forecasts start, such as 2017-01-01T00, or first,
            last or all.
        hours: Length of the forecasts.
        every: Hours between two states that are written.
        output: Store that is written.
        overwrite_output: Replace the store if it exists.
    """
    path = Path(output)
    require_free(path, overwrite=overwrite_output)
    if "://" not in analyses:
        require_apart(path, [Path(analyses)])
    model = _model(place, forecast, forecast_arguments)
    leads = Leads(hours, every)
    leads.check(model.forecast)
    with open_wb2(analyses, model.channels) as dataset:
        channels = _channels(dataset, analyses, model)
        starts = choose_starts(dataset, start, analyses)
        period = [str(dataset["time"].values[n]) for n in (0, -1)]
        source = {"analyses": analyses, **model.facts}
        alone = write_forecasts(
            dataset, channels, model.forecast, leads, path, starts=starts,
            settings={**source, "arguments": forecast_arguments, "period": period},
            attributes=_attributes(dataset, source), overwrite=overwrite_output,
            progress=ticking,
        )  # fmt: skip
    if alone:
        print(f"{len(alone)} of {len(starts)} forecasts start from one state, since {analyses} has "
              "none one step earlier")  # fmt: skip
    shown = ", ".join(channels.labels[:8]) + (", ..." if channels.num_channels > 8 else "")
    print(f"{len(starts)} forecasts of {len(leads.deltas)} states of {shown}")
    print(path)


def _channels(dataset: xr.Dataset, analyses: str, model: NamedForecast) -> ChannelSpec:
    """Return the channels that the model is given.

    Raises:
        GatesError: The store holds forecasts, or is on another grid than the model.
    """
    if "prediction_timedelta" in dataset.dims:
        raise GatesError(f"{analyses} holds forecasts: select one prediction_timedelta")
    if model.grid is not None:
        require_grid(analyses, dataset_grid(dataset), model.grid, "the forecast model")
    return model.channels or store_channels(dataset)


def _attributes(dataset: xr.Dataset, source: Mapping[str, str]) -> dict[str, Any]:
    """Return what the store says of model and analyses."""
    kept = {
        f"analysis_{name}": dataset.attrs[name] for name in OF_ANALYSES if name in dataset.attrs
    }
    title = {"title": "Forecasts by gates weather forecast", "method": "forecast"}
    return {**title, **source, **kept, **made_by()}


def _model(place: Place, name: str, arguments: Mapping[str, Any] | None) -> NamedForecast:
    """Return the forecast model, which may be that of the configuration."""
    if name != CONFIGURED:
        return named_forecast(name, arguments=arguments)
    if place.config_path is None:
        raise GatesError("--forecast model is that of a configuration: add --config, or name one")
    listed = (read_config(place.config_path).get("model") or {}).get("forecasts")
    one = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(one, dict) or "class_path" not in one:
        raise GatesError(NO_FORECAST)
    found = named_forecast(
        str(one["class_path"]), arguments={**(one.get("init_args") or {}), **(arguments or {})}
    )
    return found._replace(facts={**found.facts, "configuration": place.config})
