"""Analyses of backgrounds with a table of reports, by a method of an experiment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import sha256
from weather.assimilation import WINDOW_HOURS, Analyses, ObservedBy, Reports, by_channel
from weather.baselines.assimilator import Assimilator
from weather.data.axes import dataset_grid, to_dataset, to_tensor
from weather.data.store import naming, open_wb2, require_grid
from weather.data.writing import write_wb2
from weather.experiments.experiment import (
    Experiment,
    Method,
    Settings,
    Task,
    built,
    choice_name,
    is_stored,
)
from weather.experiments.osse.osse_experiment import SEALED
from weather.experiments.osse.rivals import CORRECTIONS, DAMPED
from weather.experiments.reanalysis.store_data import ReanalysisData
from weather.models.adas.analysis import AdasAnalysis, load_weights
from weather.models.adas.presets import FORMS
from weather.observations.report_table import ObservationTable
from weather.operations.forecasts import NamedForecast, choose_starts, find_forecast
from weather.operations.report_tables import LeftOut, read_reports
from weather.progress import Progress, Say, silent, unsaid
from weather.training.adas_module import AdasModule

# What errs least over all held-out real fields, by `gates weather evaluate --config era5_ensemble`;
# the page of results has the figures.
DEFAULT_METHOD = "oi"

LARGE_BYTES = 2**28  # of a background store; more are not read as a whole
LOST = 1.01  # error over the least one, from which on a method has lost
ENOUGH_CELLS = 500  # observed, to tell which background error fits


@dataclass(frozen=True)
class AnalysisOptions:
    """What analyses are made of, whether independent or in a cycle.

    Args:
        observations: Table of reports; of a long cycle also a folder of such tables.
        background: WeatherBench-2 store with the channels and the grid of the experiment; None for
            the backgrounds of the experiment.
        forecast: Name of the forecast model of a cycle, ``model`` for the first one of the
            configuration, else see `weather.operations.forecasts.named_forecast`.
        method: Name of a method of the experiment or of a form of the network.
        task: Task whose settings and background error are used; if None the one whose background
            error fits the reports best, of several the first.
        weights: File of the network; None for what is kept.
        gross_check: Departure in standard deviations beyond which an observation is rejected.
        representativeness: Standard deviation within a cell, by variable; none if None.
        background_error: Standard deviation of the background error, by variable; where it is not
            given, that of the task.
        observation_operator: How the background at a report is found.
    """

    observations: str
    background: str | None = None
    forecast: str | None = None
    method: str = DEFAULT_METHOD
    task: str | None = None
    weights: str | None = None
    gross_check: float = 5.0
    representativeness: Mapping[str, float] | None = None
    background_error: Mapping[str, float] | None = None
    observation_operator: ObservedBy = "nearest_cell"


class Kept:
    """What training and tuning left; here nothing, a subclass knows a place.

    Args:
        configuration: Name of the configuration, which outputs state.
        settings: All that decides a result, by name.
    """

    def __init__(self, configuration: str = "", settings: Mapping[str, Any] | None = None) -> None:
        self.configuration, self.settings = configuration, dict(settings or {})

    def weights(self, form: str) -> Path | None:  # noqa: ARG002
        """Return the file of a network of a form; None where there is none."""
        return None

    def read(self, path: Path, analysis: AdasAnalysis) -> None:
        """Read the weights of a file into a network.

        Raises:
            GatesError: The file is missing, damaged, or belongs to another configuration.
        """
        load_weights(path, analysis)

    def chosen(self, name: str) -> Settings:  # noqa: ARG002
        """Return the tuned setting of a ``<method>@<task>`` by this name; empty if none is."""
        return {}

    def scored(self, task: str) -> dict[str, float]:  # noqa: ARG002
        """Return by method the error on the held-out data of a task, over all channels."""
        return {}


class Assimilation:
    """Assimilates reports into backgrounds.

    Args:
        model: The module of the configuration.
        experiment: Its channels, grid, methods and units.
        kept: Where weights and tuned settings are found; ``Kept()`` for nowhere.
        options: What the analyses are made of.
        progress: Shows how far the work is.
        say: Called with every line for the user.

    Attributes:
        attributes: What was used, for the attributes of stores.

    Raises:
        GatesError: There is no such task.
    """

    def __init__(
        self,
        model: AdasModule,
        experiment: Experiment,
        kept: Kept,
        options: AnalysisOptions,
        *,
        progress: Progress = silent,
        say: Say = unsaid,
    ) -> None:
        self.model, self.experiment, self.options = model, experiment, options
        self.kept, self.progress, self.say = kept, progress, say
        self.attributes: dict[str, Any] = {
            "method": options.method,
            "configuration": self.kept.configuration,
        }
        self._take(_known_task(experiment, options.task))

    def _take(self, task: Task) -> None:
        self.task, self.chosen_for = task.name, getattr(task, "chosen_for", task.name)
        self.attributes["task"] = self.task

    def analyze(self, cycles: int = 1) -> Analyses:
        """Return the analyses: of every background, or of a cycle if there is a forecast model.

        Args:
            cycles: Analyses in a cycle, which starts from the last background.

        Raises:
            GatesError: An input is missing, damaged or does not fit the configuration, no report
                belongs to an analysis, or an analysis is not finite.
        """
        options, forecast = self.options, self.options.forecast
        if cycles < 1:
            raise GatesError(f"--cycles must be at least 1, found {cycles}")
        if forecast is None and cycles > 1:
            raise GatesError(
                f"--cycles {cycles} needs --forecast: give `model` for that of the configuration, "
                "or the class path of another one"
            )
        table = read_reports(options.observations, self.say)
        states, times = self._background(table=table, last=forecast is not None)
        if forecast is not None:
            times = times[-1] + np.arange(cycles) * np.timedelta64(
                round(self.model.hours * 3600), "s"
            )
        unused = self._require_reports(table, times)
        self._fit_task(table, states if forecast is None else states[-1:], times)
        assimilator, sd = self._method()
        reports = self._reports(table, sd)
        if forecast is None:
            result = reports.analyze(assimilator, states, times, self.progress)
        else:
            model = self._forecast(forecast).forecast
            result = reports.cycle(
                assimilator, model, states[-1], times, self.model.hours, self.progress
            )
        reports.require_plausible()
        self._tell(reports, unused.line())
        return result

    def _tell(self, reports: Reports, line: str) -> None:
        """Say what was left out and rejected, and where errors that count do not fit."""
        error = self.experiment.background_error(self.task)
        counts = error is not None or self.options.method in FORMS
        for text in (line, reports.warning(), reports.misfit() if counts else ""):
            if text:
                self.say(text)

    def write(
        self,
        analyses: Analyses,
        path: Path,
        *,
        overwrite: bool = False,
        made_by: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the analyses as a WeatherBench-2 store whose attributes list their inputs.

        Args:
            analyses: Of `analyze`.
            path: Store to write.
            overwrite: Replace an existing store.
            made_by: Further attributes.
        """
        for time, observed, rejected in zip(*analyses[1:], strict=True):
            stamp = np.datetime_as_string(time, unit="m")
            self.say(f"{stamp}  {observed} cells observed, {rejected} rejected by the gross check")
        experiment, options = self.experiment, self.options
        dataset = to_dataset(
            analyses.states, experiment.channels, experiment.grid, times=analyses.times
        )
        dataset.attrs = {
            "title": "Analyses by gates weather assimilate",
            "background": options.background or "",
            **self.attributes,
            "observations": options.observations,
            "observations_sha256": sha256(Path(options.observations)),
            "window_hours": WINDOW_HOURS,
            "gross_check": options.gross_check,
            "observation_operator": options.observation_operator,
            "observed_cells": analyses.observed,
            "used_cells": [
                observed - rejected
                for observed, rejected in zip(analyses.observed, analyses.rejected, strict=True)
            ],
            "rejected_cells": analyses.rejected,
            **(made_by or {}),
        }
        return write_wb2(dataset, path, overwrite=overwrite)

    def _require_reports(self, table: ObservationTable, times: np.ndarray) -> LeftOut:
        """Refuse a table of which no report belongs to an analysis; return which do not."""
        unused = LeftOut.of(table, self.experiment.channels, times)
        unused.require_used(
            self.options.observations, times, "give reports or a background of that time"
        )
        return unused

    def _background(
        self,
        start: str | None = None,
        table: ObservationTable | None = None,
        *,
        last: bool = False,
    ) -> tuple[Tensor, np.ndarray]:
        """Return states (T,C,H,W) of the background with their times, or the one of a start.

        Args:
            start: The only time that is wanted.
            table: Of a large store, only the times that have reports are wanted.
            last: Of a large store, only the last time is wanted, where a cycle begins.

        Raises:
            GatesError: There is no background, or it does not fit the configuration.
        """
        path, experiment = self.options.background, self.experiment
        if path is not None:
            with open_wb2(path, experiment.channels) as dataset:
                require_grid(path, dataset_grid(dataset), experiment.grid)
                if "prediction_timedelta" in dataset.dims:
                    raise GatesError(f"{path} holds forecasts: select one prediction_timedelta")
                if start is not None:
                    dataset = dataset.sel(time=choose_starts(dataset, [start], path))
                elif table is not None and dataset.nbytes > LARGE_BYTES:
                    dataset = dataset.isel(time=self._wanted(dataset["time"].values, table, last))
                with naming(path):
                    states = to_tensor(dataset, experiment.channels)
                if states.ndim == 5:
                    states = states.mean(1)  # the mean of an ensemble is its best single state
                return states, dataset["time"].values
        if table is None or not isinstance(experiment, ReanalysisData):
            raise GatesError(
                "--background is missing: give a store in the schema of WeatherBench 2 with the "
                "channels and the grid of the configuration"
            )
        experiment.prepare(self.progress)
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
        if self.options.observation_operator == "interpolation_in_time":
            near[:-1] |= (ends > starts)[1:]
            near[1:] |= (ends > starts)[:-1]
        return np.flatnonzero(near)

    def _reports(
        self,
        table: ObservationTable | Callable[[np.datetime64], ObservationTable],
        background_sd: Tensor,
    ) -> Reports:
        channels, given = self.experiment.channels, self.options.representativeness
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
            factor=self.options.gross_check,
            representativeness=representativeness,
            observation_operator=self.options.observation_operator,
        )

    def _forecast(self, name: str) -> NamedForecast:
        """Return the forecast model, and name it in the attributes."""
        forecast = find_forecast(name, self.model, self.experiment.channels)
        if forecast.grid is not None:
            require_grid(
                "the configuration", self.experiment.grid, forecast.grid, f"--forecast {name}"
            )
        self.attributes |= forecast.facts
        return forecast

    def _fit_task(
        self,
        table: ObservationTable | Callable[[np.datetime64], ObservationTable],
        states: Tensor,
        times: np.ndarray,
    ) -> None:
        """Take the task whose background error fits the reports best, unless one is asked for."""
        experiment, misfits = self.experiment, {}
        for task in experiment.tasks() if self.options.task is None else ():
            sd = experiment.background_error(task.name)
            if sd is None:
                return
            reports = Reports(table, experiment.grid, experiment.channels, sd)
            for state, time in zip(states, times, strict=False):
                if sum(reports.observed) < ENOUGH_CELLS:
                    reports.at(time, state)
            misfits[task] = float(reports.departures().log().abs().nanmean())
        if misfits:
            before, best = self.task, min(misfits, key=misfits.__getitem__)
            self._take(best)
            if self.task != before:
                self.say(f"--task {self.task}: its background error fits the reports best")

    def _compare(self, candidates: Collection[str]) -> None:
        """Tell the user of a known method that erred less than the chosen one on held-out data."""
        name, errors = self.options.method, self.kept.scored(self.task)
        best = min({*errors} & {*candidates}, key=errors.__getitem__, default=name)
        if errors.get(name, 0.0) > LOST * errors.get(best, math.inf):
            self.say(
                f"{name} errs {errors[name] / errors[best]:.2f} times as much as {best} on the "
                f"held-out data of {self.task}: --method {best}"
            )

    def _method(self) -> tuple[Assimilator, Tensor]:
        """Return the method and the background error (C,) that it and the gross check expect.

        Raises:
            GatesError: It is unknown, or has no usable weights or settings.
        """
        name, experiment = self.options.method, self.experiment
        methods = {m.name: m for m in experiment.methods(self.task) if m.members == 1}
        self._compare({*FORMS, *methods})
        if self.options.weights and name not in FORMS:
            raise GatesError(
                f"--weights is for a network, not for {name}: add --method {next(iter(FORMS))}"
            )
        if name in FORMS:
            analysis = self.model.variant(name).analysis
            path = self.options.weights or self.kept.weights(name)
            if path is None:
                raise GatesError(
                    f"there are no weights of {name}: train them with `gates weather fit` or "
                    "`gates weather evaluate`, or give --weights"
                )
            self.kept.read(Path(path), analysis)
            self.attributes |= {"weights": str(path), "weights_sha256": sha256(Path(path))}
            sd = experiment.background_error(self.task)
            sd = self._stated_error(analysis.background_sd if sd is None else sd)
            return analysis.eval().expecting(sd, experiment.grid), sd
        experiment.setup()
        stated = experiment.background_error(self.task)
        sd = experiment.background_sd if stated is None else stated
        if name not in methods:
            raise GatesError(self._unknown(methods))
        method = methods[name]
        choices = [choice_name(m.name, self.chosen_for) for m in (method, method.builds_on) if m]
        settings = {c: s for choice in choices for c, s in self.kept.chosen(choice).items()}
        assimilator = tuned(settings, method, self.chosen_for, self.say)
        self.attributes["settings"] = json.dumps(dict(settings.get(choices[0], {})))
        if path := method.weights:
            self.attributes |= {"weights": str(path), "weights_sha256": sha256(path)}
        return assimilator, self._stated_error(sd)

    def _unknown(self, methods: Mapping[str, Method]) -> str:
        """Return what is said of a method that does not run, with those that do."""
        name, given = self.options.method, self.options.weights
        choices = [form for form in FORMS if given or self.kept.weights(form)]
        choices += [n for n, m in methods.items() if m.weights is None or m.weights.is_file()]
        elsewhere = f" here, {', '.join(SEALED)} have it" if name in (DAMPED, *CORRECTIONS) else ""
        choose = ", ".join(dict.fromkeys(choices))
        return f"--method {name!r} is unknown{elsewhere}: choose from {choose}"

    def _stated_error(self, background_sd: Tensor) -> Tensor:
        """Return the background error of the user where one is given."""
        given = self.options.background_error
        if not given:
            return background_sd
        self.attributes["background_error"] = json.dumps(dict(given), sort_keys=True)
        return by_channel(given, self.experiment.channels, background_sd, "background_error")


def tuned(settings: Settings, method: Method, task: str, say: Say = unsaid) -> Assimilator:
    """Return a method with its tuned setting, or, with a warning, with the middle of its box.

    Args:
        settings: Those that were chosen.
        method: Method with its box.
        task: Name of the task.
        say: Called with the warning.

    Raises:
        GatesError: It refuses the setting.
    """
    for part in (method, method.builds_on):
        if part and part.box and not is_stored(settings, part, task):
            say(
                f"{choice_name(part.name, task)} was never tuned and uses the middle of its range; "
                "`gates weather tune` finds a better setting"
            )
    return built(settings, method, task)


def _known_task(experiment: Experiment, name: str | None) -> Task:
    """Return a task by its name, the first one if None; any density has tasks.

    Raises:
        GatesError: There is none of this name.
    """
    tasks = [*experiment.tasks()]
    names = ", ".join(task.name for task in tasks)
    for part in (name or "").split("/"):
        with suppress(ValueError):
            tasks += experiment.tasks([float(part)])
    for task in tasks:
        if name in (None, task.name):
            return task
    raise GatesError(f"--task {name!r} is unknown: choose from {names}, or one of another density")
