"""Tables of reports: read for analyses, counted where none uses them, simulated over a truth."""

from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from core_gates.errors import GatesError
from harness.files import require_free
from weather.assimilation import WINDOW_HOURS
from weather.data.axes import dataset_grid, to_tensor
from weather.data.store import naming, open_wb2
from weather.experiments.experiment import Experiment
from weather.observations.gridded import left_out
from weather.observations.report_table import OUT_OF_RANGE, ObservationTable, table_format
from weather.observations.simulated import simulate_table
from weather.progress import Say, unsaid
from weather.state import ChannelSpec


def read_reports(path: str | Path, say: Say = unsaid) -> ObservationTable:
    """Return a table in which values that are out of range are flagged.

    Args:
        path: Parquet or CSV.
        say: Called with how many are flagged, if any.

    Raises:
        GatesError: It cannot be read, holds no reports, or those of a variable are all flagged.
    """
    table = ObservationTable.read(path, flag_out_of_range=True)
    if not len(table):
        raise GatesError(f"{path} holds no reports, expected some: nothing is written")
    flagged = table.frame["qc"] == OUT_OF_RANGE
    for name, all_flagged in flagged.groupby(table.frame["variable"]).all().items():
        if all_flagged:
            raise GatesError(
                f"{path}: every report of {name} is out of range or flagged by qc, expected "
                "SI units: convert it, state its unit in a column units, or drop its rows"
            )
    if flagged.any():
        say(f"{flagged.sum()} of {len(table)} reports are out of range or flagged, left out")
    return table


class LeftOut:
    """How many reports of some tables no analysis uses, and why.

    Attributes:
        count: Reports.
        good: Those that are not flagged.
        unused: Those of them that are left out.
    """

    def __init__(self) -> None:
        self.count = self.good = self.unused = 0
        self._parts = [0, 0, 0]
        self._span: list[pd.Timestamp] = []
        self._names: set[str] = set()
        self._levels: set[float] = set()

    @classmethod
    def of(cls, table: ObservationTable, channels: ChannelSpec, times: np.ndarray) -> "LeftOut":
        """Return the count of one table, see `add`."""
        summary = cls()
        summary.add(table, channels, times)
        return summary

    def add(self, table: ObservationTable, channels: ChannelSpec, times: np.ndarray) -> None:
        """Count the reports of a table that belong to none of the times, or to no channel."""
        parts = left_out(table, channels, times, window_hours=WINDOW_HOURS)
        self.count += len(table)
        self.good += int((table.frame["qc"] == 0).sum())
        self.unused += sum(map(len, parts))
        self._parts = [n + len(part) for n, part in zip(self._parts, parts, strict=True)]
        if len(parts.time):
            ends = [parts.time["time"].min(), parts.time["time"].max(), *self._span]
            self._span = [min(ends), max(ends)]
        self._names |= set(parts.variable["variable"])
        self._levels |= set(parts.level["level_hpa"].fillna(np.inf))

    def line(self) -> str:
        """Return one line; empty if none is left out."""
        time, variable, level = self._parts
        reasons = []
        if time:
            span = f"{self._span[0]} to {self._span[1]}"
            reasons.append(f"{time} not within {WINDOW_HOURS:g} h of an analysis ({span})")
        if variable:
            names = ", ".join(sorted(self._names))
            reasons.append(f"{variable} of variables that the configuration lacks ({names})")
        if level:
            held = sorted(level for level in self._levels if level < np.inf)
            shown = [f"{level:g}" for level in held[:5]] + ["..."] * (len(held) > 5)
            shown += ["none given"] * (np.inf in self._levels)
            reasons.append(f"{level} of levels that it lacks ({', '.join(shown)})")
        if not reasons:
            return ""
        return f"{self.unused} of {self.count} reports are left out: {'; '.join(reasons)}"

    def require_used(self, path: str | Path, times: np.ndarray, advice: str) -> None:
        """Refuse tables of which no report belongs to an analysis.

        Args:
            path: Where they are.
            times: (T,) of the analyses, ascending.
            advice: What the user can do.

        Raises:
            GatesError: The message lists the times, variables and levels of the reports.
        """
        if self.good > self.unused:
            return
        why = self.line()
        first, last = (np.datetime_as_string(time, unit="m") for time in (times[0], times[-1]))
        raise GatesError(
            f"{path}: no report belongs to an analysis of {first} to {last}"
            f"{f', {why}' if why else ''}: nothing is written, {advice}"
        )


def simulate_reports(
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
