"""Simulated reports of a truth: a table to start from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import xarray as xr

from core_gates.errors import GatesError
from harness.files.atomic import require_free
from weather.data.store import naming
from weather.data.tensors import dataset_grid, to_tensor
from weather.data.wb2 import open_wb2
from weather.experiments.experiment import Experiment
from weather.observations.simulation import simulate_table
from weather.observations.table import ObservationTable, table_format


def observe_store(
    source: Experiment,
    truth: str | Path,
    output: Path,
    *,
    stations: int,
    member: int,
    start: int,
    times: int,
    seed: int,
    overwrite: bool = False,
) -> ObservationTable:
    """Simulate the reports of stations at some times of a store.

    Args:
        source: Has the channels and observation errors.
        truth: A WeatherBench-2 store.
        output: Table to write.
        stations: Number of stations.
        member: Member that is the truth, if the store has members.
        start: Index of the first time.
        times: Number of successive times.
        seed: Of stations and errors.
        overwrite: Replace an existing table.

    Returns:
        The table as written.

    Raises:
        GatesError: The store has no such member or time, a number is not positive, or the table
            exists or would be neither Parquet nor CSV.
    """
    require_free(output, overwrite=overwrite)
    table_format(output)
    for name, value in (("stations", stations), ("times", times)):
        if value < 1:
            raise GatesError(f"--{name} must be at least 1, found {value}")
    with open_wb2(truth, source.channels) as dataset:
        dataset = _select(dataset, member, start, times)
        with naming(truth):
            states, grid = to_tensor(dataset, source.channels), dataset_grid(dataset)
        tables = [
            simulate_table(
                state,
                grid,
                source.channels,
                time=time,
                count=stations,
                error_sd=source.observation_error,
                seed=seed + number,
            ).frame
            for number, (state, time) in enumerate(zip(states, dataset["time"].values, strict=True))
        ]
    table = ObservationTable.from_frame(pd.concat(tables, ignore_index=True))
    table.write(output)
    return table


def _select(dataset: xr.Dataset, member: int, start: int, times: int) -> xr.Dataset:
    """Return one member at successive times."""
    if "number" in dataset.dims:
        if not 0 <= member < dataset.sizes["number"]:
            raise GatesError(
                f"--member {member} does not exist: the store has members 0 to "
                f"{dataset.sizes['number'] - 1}"
            )
        dataset = dataset.isel(number=member)
    count = dataset.sizes["time"]
    first = start % count if -count <= start < count else count
    if first + times > count:
        raise GatesError(
            f"the store has {count} times, {times} from index {start} do not fit: choose "
            f"--time from {-count} to {count - times}"
        )
    return dataset.isel(time=slice(first, first + times))
