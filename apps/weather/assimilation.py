"""Assimilate a user's observations into a user's background."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from apps.weather.choices import chosen_methods, chosen_networks, settings_of, tuned
from apps.weather.forecast import NamedForecast, find_named
from apps.weather.networks import Networks, fitted, load_trained, optimizers_of
from core_gates.errors import GatesError
from harness.experiment import Run
from harness.files import sha256
from harness.runs.environment import made_by
from harness.runs.ticker import ticking
from weather.assimilation import WINDOW_HOURS, Analyses, ObservedBy, Reports, by_channel
from weather.baselines.assimilator import Assimilator
from weather.data.grids import require_grid
from weather.data.store import naming
from weather.data.tensors import dataset_grid, to_dataset, to_tensor
from weather.data.wb2 import open_wb2
from weather.data.write import write_wb2
from weather.experiments.experiment import Experiment, expecting
from weather.experiments.method import choice_name
from weather.experiments.reanalysis.data import ReanalysisData
from weather.models.adas.forms import FORMS
from weather.observations.superob import left_out
from weather.observations.table import OUT_OF_RANGE, ObservationTable
from weather.operations.forecasts import choose_starts
from weather.state import ChannelSpec
from weather.training.module import AdasModule

LARGE_BYTES = 2**28  # of a background store; more are not read as a whole


class Inputs(NamedTuple):
    """What the analyses are made of.

    Attributes:
        background: WeatherBench-2 store; None for the backgrounds of the experiment.
        observations: Table of reports.
        method: Name of the method.
        weights: File of the network; None for that of the run folder or the package.
        gross_check: Departure in standard deviations beyond which an observation is rejected.
        representativeness: Standard deviation within a cell, by variable.
        background_error: Standard deviation of the background error, by variable.
        observation_operator: How the background at a report is found.
    """

    background: str | None
    observations: str
    method: str
    weights: str | None = None
    gross_check: float = 5.0
    representativeness: Mapping[str, float] | None = None
    background_error: Mapping[str, float] | None = None
    observation_operator: ObservedBy = "nearest_cell"


class Assimilation:
    """One call of ``gates weather assimilate``.

    Args:
        model: The module of the configuration.
        experiment: Its channels, grid, methods and units.
        run: Where weights and tuned settings are found.
        inputs: What the analyses are made of.
        task: The task whose settings and background error are used; the first one if None.

    Raises:
        GatesError: There is no such task.
    """

    def __init__(
        self,
        model: AdasModule,
        experiment: Experiment,
        run: Run,
        inputs: Inputs,
        task: str | None,
    ) -> None:
        self.model, self.experiment, self.run_of = model, experiment, run
        self.inputs = inputs
        self.task = _known_task(experiment, task)
        self.attributes: dict[str, Any] = {
            "method": inputs.method,
            "task": self.task,
            "configuration": run.config,
        }

    def run(self, forecast: str | None, cycles: int) -> Analyses:
        """Return the analyses; see ``gates weather assimilate --help``.

        Raises:
            GatesError: An input is missing, damaged or does not fit the configuration, no report
                belongs to an analysis, or an analysis is not finite.
        """
        if cycles < 1:
            raise GatesError(f"--cycles must be at least 1, found {cycles}")
        if forecast is None and cycles > 1:
            raise GatesError(
                f"--cycles {cycles} needs --forecast: give `model` for that of the configuration, "
                "or the class path of another one"
            )
        table = self._table()
        states, times = self._background(
            self.inputs.background, table=table, last=forecast is not None
        )
        if forecast is not None:
            step = np.timedelta64(round(self.model.hours * 3600), "s")
            times = times[-1] + np.arange(cycles) * step
        self._require_reports(table, times)
        assimilator, sd = self._method(self.inputs.method, self.inputs.weights)
        reports = self._reports(table, sd)
        if forecast is None:
            found = reports.analyze(assimilator, states, times, ticking)
        else:
            model = self._forecast(forecast).forecast
            found = reports.cycle(assimilator, model, states[-1], times, self.model.hours, ticking)
        reports.require_plausible()
        for line in (left_out_line(table, self.experiment.channels, times), reports.warning()):
            if line:
                print(line)
        return found

    def write(self, analyses: Analyses, path: Path, *, overwrite: bool) -> Path:
        """Write the analyses as a WeatherBench-2 store whose attributes list their inputs."""
        for time, observed, rejected in zip(*analyses[1:], strict=True):
            stamp = np.datetime_as_string(time, unit="m")
            print(f"{stamp}  {observed} cells observed, {rejected} rejected by the gross check")
        experiment, inputs = self.experiment, self.inputs
        dataset = to_dataset(
            analyses.states, experiment.channels, experiment.grid, times=analyses.times
        )
        dataset.attrs = {
            "title": "Analyses by gates weather assimilate",
            "background": inputs.background or "",
            **self.attributes,
            "observations": inputs.observations,
            "observations_sha256": sha256(Path(inputs.observations)),
            "window_hours": WINDOW_HOURS,
            "gross_check": inputs.gross_check,
            "observation_operator": inputs.observation_operator,
            "observed_cells": analyses.observed,
            "used_cells": [
                observed - rejected
                for observed, rejected in zip(analyses.observed, analyses.rejected, strict=True)
            ],
            "rejected_cells": analyses.rejected,
            **made_by(),
        }
        return write_wb2(dataset, path, overwrite=overwrite)

    def _table(self) -> ObservationTable:
        path = self.inputs.observations
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
            print(f"{flagged.sum()} of {len(table)} reports are out of range or flagged, left out")
        return table

    def _require_reports(self, table: ObservationTable, times: np.ndarray) -> None:
        """Refuse a table of which no report belongs to an analysis.

        Raises:
            GatesError: The message lists the times, variables and levels of the reports.
        """
        good = int((table.frame["qc"] == 0).sum())
        parts = left_out(table, self.experiment.channels, times, window_hours=WINDOW_HOURS)
        if good > sum(map(len, parts)):
            return
        why = left_out_line(table, self.experiment.channels, times)
        first, last = (np.datetime_as_string(time, unit="m") for time in (times[0], times[-1]))
        raise GatesError(
            f"{self.inputs.observations}: no report belongs to an analysis of {first} to {last}"
            f"{f', {why}' if why else ''}: nothing is written, give reports or a background of "
            "that time"
        )

    def _background(
        self,
        path: str | None,
        start: str | None = None,
        table: ObservationTable | None = None,
        *,
        last: bool = False,
    ) -> tuple[Tensor, np.ndarray]:
        """Return states (T,C,H,W) of a store with their times, or the one of a start.

        Args:
            path: The store; None for the backgrounds of the experiment.
            start: The only time that is wanted.
            table: Of a large store, only the times that have reports are wanted.
            last: Of a large store, only the last time is wanted, where a cycle begins.
        """
        if path is None:
            return self._own_background(table, last=last)
        with open_wb2(path, self.experiment.channels) as dataset:
            require_grid(path, dataset_grid(dataset), self.experiment.grid)
            if "prediction_timedelta" in dataset.dims:
                raise GatesError(f"{path} holds forecasts: select one prediction_timedelta")
            if start is not None:
                dataset = dataset.sel(time=choose_starts(dataset, [start], path))
            elif table is not None and dataset.nbytes > LARGE_BYTES:
                dataset = dataset.isel(time=self._wanted(dataset["time"].values, table, last))
            with naming(path):
                states = to_tensor(dataset, self.experiment.channels)
            if states.ndim == 5:
                states = states.mean(1)  # the mean of an ensemble is its best single state
            return states, dataset["time"].values

    def _own_background(
        self, table: ObservationTable | None, *, last: bool
    ) -> tuple[Tensor, np.ndarray]:
        """Return those of the experiment that have reports, or the last one.

        Raises:
            GatesError: The experiment has none.
        """
        experiment = self.experiment
        if table is None or not isinstance(experiment, ReanalysisData):
            raise GatesError(
                "--background is missing: give a store in the schema of WeatherBench 2 with the "
                "channels and the grid of the configuration"
            )
        experiment.prepare(ticking)
        times = experiment.background_times
        chosen = times[self._wanted(times, table, last)]
        self.attributes["background"] = f"{experiment.background.name}, of {experiment.store_path}"
        return experiment.background_states(chosen), chosen

    def _wanted(self, times: np.ndarray, table: ObservationTable, last: bool) -> np.ndarray:
        """Return the positions of the times that have reports, or of the last time alone."""
        if last:
            return np.asarray([len(times) - 1])
        self._require_reports(table, times)
        window = np.timedelta64(round(3600 * WINDOW_HOURS), "s")
        reports = np.sort(table.frame["time"].to_numpy(dtype="datetime64[s]"))
        starts = np.searchsorted(reports, times - window)
        ends = np.searchsorted(reports, times + window, side="right")
        near = ends > starts
        if self.inputs.observation_operator == "interpolation_in_time":
            near[:-1] |= (ends > starts)[1:]
            near[1:] |= (ends > starts)[:-1]
        return np.flatnonzero(near)

    def _reports(
        self,
        table: ObservationTable | Callable[[np.datetime64], ObservationTable],
        background_sd: Tensor,
    ) -> Reports:
        channels, given = self.experiment.channels, self.inputs.representativeness
        representativeness = None
        if given:
            zero = torch.zeros(channels.num_channels)
            representativeness = by_channel(given, channels, zero, "representativeness")
            self.attributes["representativeness"] = json.dumps(dict(given), sort_keys=True)
        self.attributes["background_error_sd"] = json.dumps(
            {
                label: float(f"{sd:.6g}")
                for label, sd in zip(channels.labels, background_sd.tolist(), strict=True)
            }
        )
        return Reports(
            table,
            self.experiment.grid,
            channels,
            background_sd,
            factor=self.inputs.gross_check,
            representativeness=representativeness,
            observation_operator=self.inputs.observation_operator,
        )

    def _forecast(self, name: str) -> NamedForecast:
        """Return the forecast model, and name it in the attributes."""
        found = find_named(name, self.model, self.experiment.channels)
        if found.grid is not None:
            require_grid(
                "the configuration", self.experiment.grid, found.grid, f"--forecast {name}"
            )
        self.attributes |= found.facts
        return found

    def _method(self, name: str, weights: str | None) -> tuple[Assimilator, Tensor]:
        """Return the method and the background error (C,) that it and the gross check expect.

        Raises:
            GatesError: It is unknown, or has no usable weights or settings.
        """
        if name in FORMS:
            analysis = self._network(name, weights)
            sd = self.experiment.background_error(self.task)
            sd = analysis.background_sd if sd is None else sd
            sd = self._stated_error(sd)
            return expecting(analysis, sd), sd
        self.experiment.setup()
        stated = self.experiment.background_error(self.task)
        sd = self.experiment.background_sd if stated is None else stated
        methods = {m.name: m for m in self.experiment.methods(self.task) if m.members == 1}
        if name not in methods:
            known = ", ".join([*FORMS, *methods])
            raise GatesError(f"--method {name!r} is unknown: choose from {known}")
        choice = choice_name(name, self.task)
        settings = settings_of(chosen_methods(self.run_of, self.experiment, [choice]))
        method = tuned(settings, methods[name], self.task)
        self.attributes["settings"] = json.dumps(dict(settings.get(choice, {})))
        return method, self._stated_error(sd)

    def _network(self, form: str, weights: str | None) -> Any:
        analysis = self.model.variant(form).analysis
        path = weights or self._kept(form)
        if path is None:
            raise GatesError(
                f"there are no weights of {form}: train them with `gates weather fit` or "
                "`gates weather evaluate`, or give --weights"
            )
        load_trained(Path(path), analysis)
        self.attributes |= {"weights": str(path), "weights_sha256": sha256(Path(path))}
        return analysis.eval()

    def _kept(self, form: str) -> Path | None:
        """Return the weights of the first seed, of the run folder or the package."""
        own = "adas_increment" if form == "open_gate" else form
        choices = {} if fitted(self.run_of, [form], [0]) else chosen_networks(self.run_of, [own])
        optimizers = optimizers_of(self.run_of, [form], [0], choices)
        return Networks(self.run_of, optimizers, [0]).path(form, 0)

    def _stated_error(self, background_sd: Tensor) -> Tensor:
        """Return the background error of the user where one is given."""
        given = self.inputs.background_error
        if not given:
            return background_sd
        self.attributes["background_error"] = json.dumps(dict(given), sort_keys=True)
        return by_channel(given, self.experiment.channels, background_sd, "background_error")


def left_out_line(table: ObservationTable, channels: ChannelSpec, times: np.ndarray) -> str:
    """Return how many reports no analysis at ``times`` uses, and why; empty if there are none."""
    tally = LeftOutTally()
    tally.add(table, channels, times)
    return tally.line()


class LeftOutTally:
    """How many reports of some tables no analysis uses, and why.

    Attributes:
        count: Reports.
        unused: Those that are left out, flagged ones not counted.
    """

    def __init__(self) -> None:
        self.count = self.unused = 0
        self._parts = [0, 0, 0]
        self._span: list[pd.Timestamp] = []
        self._names: set[str] = set()
        self._levels: set[float] = set()

    def add(self, table: ObservationTable, channels: ChannelSpec, times: np.ndarray) -> None:
        """Count the reports of a table that belong to none of the times, or to no channel."""
        parts = left_out(table, channels, times, window_hours=WINDOW_HOURS)
        self.count += len(table)
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
            reasons.append(f"{level} of levels that it lacks ({self._shown_levels()})")
        if not reasons:
            return ""
        return f"{self.unused} of {self.count} reports are left out: {'; '.join(reasons)}"

    def _shown_levels(self) -> str:
        """Return the first levels as text; infinity stands for none."""
        found = sorted(level for level in self._levels if level < np.inf)
        shown = [f"{level:g}" for level in found[:5]] + ["..."] * (len(found) > 5)
        return ", ".join(shown + ["none given"] * (np.inf in self._levels))


def _known_task(experiment: Experiment, task: str | None) -> str:
    """Return a task by its name, the first one if None; any density has tasks.

    Raises:
        GatesError: There is none of this name.
    """
    known = [one.name for one in experiment.tasks()]
    if task is None or task in known:
        return task or known[0]
    for part in task.split("/"):
        with suppress(ValueError):
            if task in (one.name for one in experiment.tasks([float(part)])):
                return task
    raise GatesError(
        f"--task {task!r} is unknown: choose from {', '.join(known)}, or one of another density"
    )
