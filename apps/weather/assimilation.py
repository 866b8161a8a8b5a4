"""Assimilate a user's observations into a user's background."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from apps.weather.forecast import find_forecast
from apps.weather.source import background_sd, methods_of, tasks_of
from apps.weather.training import Networks, load_trained
from apps.weather.tuning import built
from core_gates.errors import GatesError
from harness.runs.ticker import ticking
from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle
from weather.data.store import naming
from weather.data.tensors import dataset_grid, to_dataset, to_tensor
from weather.data.wb2 import open_wb2
from weather.data.write import write_wb2
from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.experiments.method import Settings
from weather.grid import Grid
from weather.models.adas.forms import FORMS
from weather.observations.gridded import GriddedObservations, gross_check
from weather.observations.superob import grid_table, left_out
from weather.observations.table import OUT_OF_RANGE, ObservationTable
from weather.state import ChannelSpec
from weather.training.module import AdasModule
from weather.training.stream import ProblemSource

WINDOW_HOURS = 3.0
GRID_TOLERANCE = 1e-4  # degrees; coordinates in float32 differ by 2e-5


class Analyses(NamedTuple):
    """Analyses (T,C,H,W) at T ``times``, with the numbers of cells (T,) observed and rejected."""

    states: Tensor
    times: np.ndarray
    observed: list[int]
    rejected: list[int]


class Assimilation:
    """One call of ``gates weather assimilate``.

    Args:
        model: The module of the configuration.
        source: Its channels, grid and units.
        networks: Where weights are found.
        settings: Tuned settings.
        task: The task whose settings and background error are used; the first one if None.
        factor: Departure in standard deviations beyond which an observation is rejected.

    Raises:
        GatesError: There is no such task, or the factor is not positive.
    """

    def __init__(
        self,
        model: AdasModule,
        source: ProblemSource,
        networks: Networks,
        settings: Settings,
        task: str | None,
        factor: float = 5.0,
    ) -> None:
        self.model, self.source, self.networks = model, source, networks
        self.settings = settings
        if not factor > 0:
            raise GatesError(f"--gross_check must be positive, found {factor:g}")
        self.factor = factor
        tuned = [name.partition("/")[2] for name in settings if "/" in name]
        known = list(dict.fromkeys([*tasks_of(source), *tuned]))
        if task is not None and task not in known:
            raise GatesError(f"--task {task!r} is unknown: choose from {', '.join(known)}")
        self.task = task or known[0]
        self.sd = torch.empty(0)
        self.counts: dict[str, list[int]] = {"observed": [], "rejected": []}

    def run(
        self,
        background: str,
        observations: str,
        method: str,
        weights: str | None,
        forecast: str | None,
        cycles: int,
    ) -> Analyses:
        """Return the analyses; see ``gates weather assimilate --help``.

        Raises:
            GatesError: An input is missing, damaged or does not fit the configuration, or an
                analysis is not finite.
        """
        if cycles < 1:
            raise GatesError(f"--cycles must be at least 1, found {cycles}")
        if forecast is None and cycles > 1:
            raise GatesError(
                f"--cycles {cycles} needs --forecast: give `model` for that of the configuration, "
                "or the class path of your own"
            )
        table = ObservationTable.read(observations, flag_out_of_range=True)
        if flagged := int((table.frame["qc"] == OUT_OF_RANGE).sum()):
            print(f"{flagged} of {len(table)} reports are out of range and left out")
        states, times = self._background(background)
        assimilator = self._method(method, weights)
        if forecast is None:
            found = self._each(assimilator, table, states, times)
        else:
            found = self._cycle(assimilator, table, states[-1], times[-1], forecast, cycles)
        if line := left_out_line(table, self.source.channels, found.times):
            print(line)
        bad = ~found.states.isfinite().flatten(1).all(1).numpy()
        if bad.any():
            stamp = np.datetime_as_string(found.times[bad][0], unit="m")
            raise GatesError(
                f"{int(bad.sum())} of {len(bad)} analyses are not finite, the first of {stamp}: "
                "check the weights, the forecast model and the observation errors"
            )
        return found

    def write(self, analyses: Analyses, path: Path, *, overwrite: bool) -> Path:
        """Write the analyses as a WeatherBench-2 store, and say what they are made of."""
        for time, observed, rejected in zip(*analyses[1:], strict=True):
            stamp = np.datetime_as_string(time, unit="m")
            print(f"{stamp}  {observed} cells observed, {rejected} rejected by the gross check")
        dataset = to_dataset(
            analyses.states, self.source.channels, self.source.grid, times=analyses.times
        )
        return write_wb2(dataset, path, overwrite=overwrite)

    def _background(self, path: str) -> tuple[Tensor, np.ndarray]:
        with open_wb2(path, self.source.channels) as dataset:
            _require_grid(path, dataset_grid(dataset), self.source.grid)
            if "prediction_timedelta" in dataset.dims:
                raise GatesError(f"{path} holds forecasts: select one prediction_timedelta")
            with naming(path):
                states = to_tensor(dataset, self.source.channels)
            if states.ndim == 5:
                states = states.mean(1)  # the mean of an ensemble is its best single state
            return states, dataset["time"].values

    def _method(self, name: str, weights: str | None) -> Assimilator:
        """Return the method, and take the background error from it or from the source.

        Raises:
            GatesError: It is unknown, has no usable weights or settings, or the background error is
                not positive.
        """
        assimilator = self._build(name, weights)
        if not (self.sd.isfinite() & (self.sd > 0)).all():
            raise GatesError(
                f"the background error of {self.task} is {self.sd.tolist()}, expected positive "
                "numbers: give other weights or run `gates weather prepare` again"
            )
        return assimilator

    def _build(self, name: str, weights: str | None) -> Assimilator:
        if name in FORMS:
            analysis = self.model.variant(name).analysis
            path = weights or self.networks.path(name, 0)
            if path is None:
                raise GatesError(
                    f"there are no weights of {name}: train them with `gates weather fit` or "
                    "`gates weather evaluate`, or give --weights"
                )
            load_trained(Path(path), analysis)
            if isinstance(self.source, Era5EnsembleSource):
                analysis = analysis.expecting(background_sd(self.source, self.task))
            self.sd = analysis.background_sd
            return analysis.eval()
        self.source.setup()
        self.sd = background_sd(self.source, self.task)
        methods = {m.name: m for m in methods_of(self.source, self.task) if m.members == 1}
        if name not in methods:
            known = ", ".join([*FORMS, *methods])
            raise GatesError(f"--method {name!r} is unknown: choose from {known}")
        return built(self.settings, methods[name], self.task)

    def _grid(
        self, table: ObservationTable, time: np.datetime64, background: Tensor
    ) -> GriddedObservations:
        """Return the observations (1,C,H,W) that pass the gross check, and count the others."""
        found = grid_table(
            table, self.source.grid, self.source.channels, time, window_hours=WINDOW_HOURS
        )
        passed = gross_check(found, background, self.sd, self.factor)
        self.counts["observed"].append(int(found.mask.sum()))
        self.counts["rejected"].append(int(found.mask.sum() - passed.mask.sum()))
        return GriddedObservations.stack([passed])

    def _analyses(self, states: list[Tensor], times: np.ndarray) -> Analyses:
        return Analyses(
            torch.stack(states), times, self.counts["observed"], self.counts["rejected"]
        )

    def _each(
        self, assimilator: Assimilator, table: ObservationTable, states: Tensor, times: np.ndarray
    ) -> Analyses:
        analyses = []
        with ticking("analyzing", len(times)) as tick:
            for state, time in zip(states, times, strict=True):
                observations = self._grid(table, time, state)
                analyses.append(assimilator.analyse(state[None, None], observations)[0, 0])
                tick()
        return self._analyses(analyses, times)

    def _cycle(
        self,
        assimilator: Assimilator,
        table: ObservationTable,
        state: Tensor,
        time: np.datetime64,
        name: str,
        cycles: int,
    ) -> Analyses:
        hours = self.model.hours
        times = time + np.arange(cycles) * np.timedelta64(round(hours * 3600), "s")
        current = iter(times)

        def check(_: GriddedObservations, background: Tensor) -> GriddedObservations:
            return self._grid(table, next(current), background[0])

        forecast = find_forecast(name, self.model)
        cycle = Cycle(forecast, assimilator, hours, quality_control=check)
        nothing = GriddedObservations.absent((1, *state.shape))
        analyses = []
        with ticking("cycling", cycles) as tick, torch.no_grad():
            for result in cycle.run(state[None, None], [nothing] * cycles):
                analyses.append(result.analysis[0, 0])
                tick()
        return self._analyses(analyses, times)


def left_out_line(table: ObservationTable, channels: ChannelSpec, times: np.ndarray) -> str:
    """Say how many reports no analysis at ``times`` takes, and why; empty if there are none."""
    time, variable, level = left_out(table, channels, times, window_hours=WINDOW_HOURS)
    reasons = []
    if len(time):
        span = f"{time['time'].min()} to {time['time'].max()}"
        reasons.append(f"{len(time)} not within {WINDOW_HOURS:g} h of an analysis ({span})")
    if len(variable):
        names = ", ".join(sorted(set(variable["variable"])))
        reasons.append(f"{len(variable)} of variables that the configuration lacks ({names})")
    if len(level):
        reasons.append(f"{len(level)} of levels that it lacks ({_levels(level)})")
    total = len(time) + len(variable) + len(level)
    return f"{total} of {len(table)} reports are left out: {'; '.join(reasons)}" if reasons else ""


def _levels(rows: pd.DataFrame) -> str:
    """Return the first levels of some reports as text."""
    found = sorted(set(rows["level_hpa"].dropna()))
    shown = [f"{level:g}" for level in found[:5]] + ["..."] * (len(found) > 5)
    return ", ".join(shown + ["none given"] * bool(rows["level_hpa"].isna().any()))


def _require_grid(path: str, found: Grid, expected: Grid) -> None:
    """Refuse a grid that is not that of the configuration."""
    difference = found.difference(expected)
    if difference <= GRID_TOLERANCE:
        return
    largest = f", whose coordinates differ by up to {difference:.3g} degrees"
    raise GatesError(
        f"{path} has {found.shape[0]} latitudes from {float(found.latitude[0]):g} and "
        f"{found.shape[1]} longitudes, expected {expected.shape[0]} from "
        f"{float(expected.latitude[0]):g} and {expected.shape[1]}"
        f"{largest if difference < math.inf else ''}: bring it to the grid of the configuration "
        "with weather.regrid.Regridder"
    )
