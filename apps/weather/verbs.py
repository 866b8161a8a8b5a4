"""The verbs of ``gates weather``: functions need no Trainer, and import late what is heavy.

The other verbs are imported together, with Lightning.
"""

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core_gates.errors import GatesError
from harness.command.configfile import read_config
from harness.command.verbs import FunctionVerb, Place, run_verb
from harness.files import require_apart, require_free, sha256
from harness.runs.folder import made_by
from harness.runs.terminal import ticking

if TYPE_CHECKING:
    from weather.observations.ingest import Account, Ingested
    from weather.operations.forecasts import NamedForecast

DEFAULT_CONFIG = "era5_ensemble"  # of verbs that need none
SIZES = "official"  # configuration of `plan`
TRAINERS = "apps.weather.commands"  # of the other verbs: it imports Lightning
TRAIN_FORECAST = "train-forecast"
HEADS = ("file", "format", "reports", "kept", "rejected")
FUNCTIONS = {
    "ingest": FunctionVerb("apps.weather.verbs:ingest", "sources"),
    "plan": FunctionVerb("apps.weather.plan:plan"),
    "forecast": FunctionVerb("apps.weather.verbs:forecast", ("analyses",)),
    "regrid": FunctionVerb("apps.weather.verbs:regrid", ("source", "target_grid", "output")),
}
"""Verbs that need neither data nor a Trainer."""


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    if arguments[0] in FUNCTIONS:
        config = SIZES if arguments[0] == "plan" else DEFAULT_CONFIG
        run_verb("weather", FUNCTIONS, arguments, config=config)
        return
    importlib.import_module(TRAINERS).run(arguments)


def ingest(
    sources: list[str],
    start: str | None = None,
    end: str | None = None,
    output: str = "observations.parquet",
    overwrite_output: bool = False,
) -> None:
    """Read the observation files of SOURCES, folders or files, into one table for assimilate.

    METAR as Parquet or text, radiosondes as text, IGRA-2 or BUFR, stations and aircraft as BUFR,
    IODA NetCDF, and tables, mixed as they are: the content of each file decides. Values are
    converted to SI units, wind to components, dewpoint to specific humidity, height to
    geopotential; soundings must be hydrostatic. A file that cannot be read is named with the
    reason and stops nothing; where no value is left, nothing is written.

    Args:
        sources: Files of observations, or folders of them.
        start: First time that is kept, such as 2017-01-02T09:00, UTC; all if null.
        end: Time from which on nothing is kept; all if null.
        output: Table that is written, as Parquet or CSV by its suffix.
        overwrite_output: Replace the table if it exists.
    """
    from weather.observations.ingest import files_in
    from weather.observations.ingest import ingest as ingest_files
    from weather.observations.report_table import Period, table_format

    target = Path(output)
    require_free(target, overwrite=overwrite_output)
    table_format(target)
    period = Period.parse(start, end)
    ingested = ingest_files(files_in(map(Path, sources), leave_out=target), period, ticking)
    _print_accounts(ingested.files)
    ingested.table.frame.attrs["files"] = {
        name: {"sha256": sha256(file.path), "format": file.format, "kept": file.kept}
        for name, file in zip(_names(ingested.files), ingested.files, strict=True)
        if file.kept
    }
    written = ingested.table.write(target)
    print(_summary(ingested))
    print(written)


def _print_accounts(accounts: Sequence["Account"]) -> None:
    """Print a row of numbers per file, then a line for each of which something is left out."""
    names = _names(accounts)
    rows = [HEADS] + [
        (
            name,
            file.format or "-",
            f"{file.reports:,}",
            f"{file.kept:,}",
            f"{file.rejected.total():,}",
        )
        for name, file in zip(names, accounts, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*left, *right]))
    for name, file in zip(names, accounts, strict=True):
        if file.why:
            print(f"{name}: {'refused: ' if file.failed else ''}{file.why}")


def _names(accounts: Sequence["Account"]) -> list[str]:
    """Return the names of files, with their folders where a name occurs twice."""
    times = Counter(file.path.name for file in accounts)
    return [file.path.name if times[file.path.name] == 1 else str(file.path) for file in accounts]


def _summary(found: "Ingested") -> str:
    frame = found.table.frame
    used = sum(file.kept > 0 for file in found.files)
    failed = sum(file.failed for file in found.files)
    refused = f", {failed} refused" if failed else ""
    return (
        f"{len(frame):,} values of {frame['station'].nunique()} stations, "
        f"{frame['time'].min():%Y-%m-%dT%H:%M} to {frame['time'].max():%Y-%m-%dT%H:%M}, "
        f"from {used} of {len(found.files)} files{refused}"
    )


def regrid(
    source: str,
    target_grid: str,
    output: str,
    method: Literal["conservative", "bilinear"] | None = None,
    missing: Literal["propagate", "refuse"] = "propagate",
    overwrite_output: bool = False,
) -> None:
    """Write all fields of the store SOURCE on TARGET_GRID into the store OUTPUT.

    SOURCE is a store as WeatherBench 2 has them, Zarr or NetCDF, with dimensions in any order and
    direction. TARGET_GRID is a name, columns first, such as 240x121_equiangular_with_poles or
    64x32_gaussian, or a store whose grid is taken. Fields are read and written block by block; a
    call that is killed is continued by the same call. Attributes, levels and times are kept.

    Args:
        source: Store that is read, Zarr or NetCDF.
        target_grid: Grid of the output: a name, or a store that has it.
        output: Store that is written.
        method: ``conservative`` averages over the overlaps of cells and keeps the mean over the
            area, ``bilinear`` interpolates; that of the name of the grid if null, else
            conservative.
        missing: ``propagate`` makes NaN of every point to which a missing value contributes,
            ``refuse`` stops there.
        overwrite_output: Replace the store if it exists.
    """
    from weather.operations.regridding import find_grid, regrid_store

    path = Path(output)
    require_free(path, overwrite=overwrite_output, option="OUTPUT")
    if "://" not in source:
        require_apart(path, [Path(source)], "OUTPUT")
    grid, stated = find_grid(target_grid)
    if None not in (method, stated) and method != stated:
        raise GatesError(
            f"--method {method} contradicts the grid {target_grid}, leave one of the two out"
        )
    result = regrid_store(
        source,
        grid,
        path,
        method=method or stated or "conservative",
        missing=missing,
        attributes=made_by(),
        overwrite=overwrite_output,
        progress=ticking,
    )
    for name, (before, after) in result.missing.items():
        print(f"{name}: {100 * before:.3g} % of the values are missing, {100 * after:.3g} % now")
    if result.left_out:
        print(
            f"left out, since they have no longitude or no latitude: {', '.join(result.left_out)}"
        )
    print(result.path)


def forecast(
    place: Place,
    analyses: str,
    forecast: str = "model",
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
        analyses: Store of the states that forecasts start from.
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
    from weather.operations.forecasts import Leads, forecast_store

    path = Path(output)
    require_free(path, overwrite=overwrite_output)
    if "://" not in analyses:
        require_apart(path, [Path(analyses)])
    model = _model(place, forecast, forecast_arguments)
    leads = Leads(hours, every)
    channels, starts, alone = forecast_store(
        analyses,
        model,
        leads,
        path,
        start=start,
        settings={"arguments": forecast_arguments},
        made_by=made_by(),
        overwrite=overwrite_output,
        progress=ticking,
    )
    if alone:
        print(f"{len(alone)} of {len(starts)} forecasts start from one state, since {analyses} has "
              "none one step earlier")  # fmt: skip
    shown = ", ".join(channels.labels[:8]) + (", ..." if channels.num_channels > 8 else "")
    print(f"{len(starts)} forecasts of {len(leads.deltas)} states of {shown}")
    print(path)


def _model(place: Place, name: str, arguments: Mapping[str, Any] | None) -> "NamedForecast":
    """Return the forecast model, which may be that of the configuration."""
    from weather.operations.forecasts import CONFIGURED, NO_FORECAST, named_forecast

    if name != CONFIGURED:
        return named_forecast(name, arguments=arguments)
    if place.config_path is None:
        raise GatesError("--forecast model is that of a configuration: add --config, or name one")
    listed = (read_config(place.config_path).get("model") or {}).get("forecasts")
    model = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(model, dict) or "class_path" not in model:
        raise GatesError(NO_FORECAST)
    forecast = named_forecast(
        str(model["class_path"]), arguments={**(model.get("init_args") or {}), **(arguments or {})}
    )
    return forecast._replace(facts={**forecast.facts, "configuration": place.config})
