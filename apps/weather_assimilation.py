"""Assimilate a user's observations into a user's background."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apps.ticker import ticking
from apps.weather_training import Networks
from core_gates.errors import GatesError
from weather.analysis import load_weights
from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, Forecast
from weather.data.stream import ProblemSource
from weather.data.tensors import dataset_grid, to_dataset, to_tensor
from weather.data.wb2 import open_wb2
from weather.data.write import write_wb2
from weather.experiments.ensemble_methods import ensemble_methods
from weather.experiments.ensemble_source import TASKS, Era5EnsembleSource
from weather.experiments.forms import FORMS
from weather.experiments.method import Method, Settings, stored
from weather.experiments.twin_methods import TwinMethods
from weather.experiments.twin_source import TwinSource
from weather.module import AdasModule
from weather.observations.gridded import GriddedObservations, gross_check
from weather.observations.superob import grid_table
from weather.observations.table import ObservationTable


class Analyses(NamedTuple):
    """Analyses (T,C,H,W) at ``times``, and how many cells were observed and rejected."""

    states: Tensor
    times: np.ndarray
    observed: int
    rejected: int


class Assimilation:
    """One call of ``gates weather assimilate``.

    Args:
        model: The module of the configuration.
        source: Its channels, grid and units.
        networks: Where weights are found.
        settings: Tuned settings.
        task: The task whose settings and background error are used.
    """

    def __init__(
        self,
        model: AdasModule,
        source: ProblemSource,
        networks: Networks,
        settings: Settings,
        task: str,
    ) -> None:
        self.model, self.source, self.networks = model, source, networks
        self.settings, self.task = settings, task

    def run(
        self,
        background: str,
        observations: str,
        method: str,
        weights: str | None,
        forecast: str | None,
        cycles: int,
    ) -> Analyses:
        """Return the analyses; see ``gates weather assimilate --help``."""
        table = ObservationTable.read(observations)
        states, times = self._background(background)
        self.source.setup()
        assimilator = self._method(method, weights)
        if forecast is None:
            if cycles != 1:
                raise GatesError("--cycles needs --forecast: without a model there is no cycle")
            return self._each(assimilator, table, states, times)
        return self._cycle(assimilator, table, states[-1], times[-1], forecast, cycles)

    def write(self, analyses: Analyses, path: Path, *, overwrite: bool) -> Path:
        """Write the analyses as a WeatherBench-2 store."""
        print(f"{analyses.observed} cells observed, {analyses.rejected} rejected by gross check")
        dataset = to_dataset(
            analyses.states, self.source.channels, self.source.grid, times=analyses.times
        )
        return write_wb2(dataset, path, overwrite=overwrite)

    def _background(self, path: str) -> tuple[Tensor, np.ndarray]:
        with open_wb2(path, self.source.channels) as dataset:
            if dataset_grid(dataset) != self.source.grid:
                raise GatesError(
                    f"{path} is on {dataset_grid(dataset)}, expected {self.source.grid}: regrid it "
                    "with weather.regrid.Regridder"
                )
            states = to_tensor(dataset, self.source.channels)
            if states.ndim == 5:
                states = states.mean(1)  # the mean of an ensemble is its best single state
            return states, dataset["time"].values

    def _method(self, name: str, weights: str | None) -> Assimilator:
        if name in FORMS:
            analysis = self.model.variant(name).analysis
            path = weights or self.networks.path(name, 0)
            if path is None:
                raise GatesError(
                    f"there are no weights of {name}: train them with `gates weather evaluate`, or "
                    "give --weights"
                )
            load_weights(path, analysis)
            return analysis.eval().expecting(self._background_sd())
        methods = {method.name: method for method in self._classical()}
        if name not in methods or methods[name].members > 1:
            single = [n for n, method in methods.items() if method.members == 1]
            raise GatesError(f"--method {name!r} is unknown: choose from {[*FORMS, *single]}")
        setting = stored(self.settings, methods[name], self.task)
        return methods[name].build(setting)

    def _classical(self) -> list[Method]:
        if isinstance(self.source, Era5EnsembleSource):
            task = next((t for t in TASKS if self.task.startswith(t)), TASKS[0])
            return ensemble_methods(self.source, task)
        assert isinstance(self.source, TwinSource)
        return TwinMethods(self.source.world).all()

    def _background_sd(self) -> Tensor:
        if isinstance(self.source, Era5EnsembleSource):
            task = next((t for t in TASKS if self.task.startswith(t)), TASKS[0])
            return self.source.task_background_sd[task]
        return self.source.background_sd

    def _grid(
        self, table: ObservationTable, time: np.datetime64, background: Tensor
    ) -> tuple[GriddedObservations, int]:
        """Return the observations (1,C,H,W) that pass the gross check, and how many did not."""
        found = grid_table(table, self.source.grid, self.source.channels, time)
        passed = gross_check(found, background, self._background_sd())
        rejected = int(found.mask.sum() - passed.mask.sum())
        return GriddedObservations.stack([passed]), rejected

    def _each(
        self, assimilator: Assimilator, table: ObservationTable, states: Tensor, times: np.ndarray
    ) -> Analyses:
        analyses, observed, rejected = [], 0, 0
        with ticking("analyzing", len(times)) as tick:
            for state, time in zip(states, times, strict=True):
                observations, lost = self._grid(table, time, state)
                observed += int(observations.mask.sum()) + lost
                rejected += lost
                analyses.append(assimilator.analyse(state[None, None], observations)[0, 0])
                tick()
        return Analyses(torch.stack(analyses), times, observed, rejected)

    def _cycle(
        self,
        assimilator: Assimilator,
        table: ObservationTable,
        state: Tensor,
        time: np.datetime64,
        forecast: str,
        cycles: int,
    ) -> Analyses:
        hours = self.model.hours
        step = np.timedelta64(int(hours * 3600), "s")
        times = np.array([time + number * step for number in range(cycles)])
        counts = {"observed": 0, "rejected": 0}
        current = iter(times)

        def check(_: GriddedObservations, background: Tensor) -> GriddedObservations:
            observations, lost = self._grid(table, next(current), background[0])
            counts["observed"] += int(observations.mask.sum()) + lost
            counts["rejected"] += lost
            return observations

        cycle = Cycle(self._forecast(forecast), assimilator, hours, quality_control=check)
        nothing = GriddedObservations.absent((1, *state.shape))
        analyses = []
        with ticking("cycling", cycles) as tick:
            for result in cycle.run(state[None, None], [nothing] * cycles):
                analyses.append(result.analysis[0, 0])
                tick()
        return Analyses(torch.stack(analyses), times, counts["observed"], counts["rejected"])

    def _forecast(self, name: str) -> Forecast:
        if name == "model":
            if not len(self.model.forecasts):
                raise GatesError("this configuration has no forecast model: give a class path")
            return self.model.forecasts[0]
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise GatesError(
                f"--forecast {name!r} cannot be imported ({error}): expected a class path such as "
                "package.module.Model"
            ) from error
        forecast: Forecast = found() if isinstance(found, type) else found
        return forecast
