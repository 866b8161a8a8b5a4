"""Assimilate a table of reports into backgrounds, time by time or in a cycle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.baselines.assimilator import Assimilator
from weather.cycle import Cycle, Forecast, FramesForecast, advance
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations, grid_table, gross_check
from weather.observations.operators import BackgroundFrames
from weather.observations.report_table import ObservationTable
from weather.progress import Progress, silent
from weather.state import ChannelSpec

WINDOW_HOURS = 3.0
FRAMES_APART_HOURS = 12.0  # farther apart, backgrounds say nothing about the time between them
SUSPICIOUS_SHARE = 0.05  # rejected of observed cells; of Gaussian errors none in a million is
SUSPICIOUS_COUNT, HOPELESS_COUNT = 3, 10
GUESSED_SHARE, GUESSED_COUNT = 0.3, 20  # rejected, and observed: fewer say nothing of a cause
FITTING = (0.5, 2.0)  # departures over expected ones that the errors may be right for


ObservedBy = Literal["nearest_cell", "interpolation", "interpolation_in_time"]
"""How the background at a report is found."""


class Analyses(NamedTuple):
    """Analyses (T,C,H,W) at T ``times``, with the numbers of cells (T,) observed and rejected."""

    states: Tensor
    times: np.ndarray
    observed: list[int]
    rejected: list[int]


class Reports:
    """A table gridded for a background at successive times, with counts of what was rejected.

    Args:
        table: The reports, or a function that returns those around a time.
        grid: Grid of the backgrounds.
        channels: Their C channels.
        background_sd: (C,) standard deviation of the background error.
        factor: Departure in standard deviations beyond which an observation is rejected.
        representativeness: (C,) standard deviation of what a cell cannot resolve, none if None.
        observation_operator: ``nearest_cell`` compares a report with the cell and level that it
            lies in; ``interpolation`` with the background interpolated to its place and pressure;
            ``interpolation_in_time`` also to its time (first guess at appropriate time, FGAT),
            which takes backgrounds at several times or a cycle.

    Attributes:
        observed: Cells observed at each time so far.
        rejected: Those of them that the gross check rejected.
        flipped: Those that it would reject, were the latitudes of the reports negative.
        latest: (2,C), cells observed and passed at the last time.

    Raises:
        GatesError: The background error or the factor is not positive, or the observation operator
            is unknown.
    """

    def __init__(
        self,
        table: ObservationTable | Callable[[np.datetime64], ObservationTable],
        grid: Grid,
        channels: ChannelSpec,
        background_sd: Tensor,
        *,
        factor: float = 5.0,
        representativeness: Tensor | None = None,
        observation_operator: ObservedBy = "nearest_cell",
    ) -> None:
        if not factor > 0:
            raise GatesError(f"--gross_check must be positive, found {factor:g}")
        if observation_operator not in get_args(ObservedBy):
            raise GatesError(
                f"the observation operator {observation_operator!r} is unknown, expected "
                f"{', '.join(get_args(ObservedBy))}"
            )
        if not (background_sd.isfinite() & (background_sd > 0)).all():
            raise GatesError(
                f"the background error is {background_sd.tolist()}, expected positive numbers: "
                "give other weights or run `gates weather prepare` again"
            )
        self.table, self.grid, self.channels = table, grid, channels
        self.background_sd, self.factor = background_sd, factor
        self.representativeness = representativeness
        self.interpolates = observation_operator != "nearest_cell"
        self.own_time = observation_operator == "interpolation_in_time"
        self.observed: list[int] = []
        self.rejected: list[int] = []
        self.flipped = 0
        self._by_channel = torch.zeros(2, channels.num_channels, dtype=torch.long)
        self._squares = torch.zeros(channels.num_channels, dtype=torch.float64)
        self.latest = torch.zeros_like(self._by_channel)

    def at(
        self, time: np.datetime64, background: Tensor, around: BackgroundFrames | None = None
    ) -> GriddedObservations:
        """Return the observations (1,C,H,W) at a time that pass the gross check.

        Args:
            time: Center of the window.
            background: (C,H,W).
            around: The background at other times, too; that of the analysis alone if None.
        """
        frames = around or BackgroundFrames.single(background)
        table = self.table if isinstance(self.table, ObservationTable) else self.table(time)
        gridded, passed = self._checked(table, time, frames)
        self.observed.append(int(gridded.mask.sum()))
        self.rejected.append(int(gridded.mask.sum() - passed.mask.sum()))
        self.latest = torch.stack([seen.mask.sum((-2, -1)) for seen in (gridded, passed)])
        self._by_channel += self.latest
        variance = self.background_sd[:, None, None].square() + passed.errors.square()
        squares = (passed.values - background).square() / variance
        self._squares += torch.where(passed.mask, squares, 0.0).double().sum((-2, -1))
        if self.rejected[-1]:
            frame = table.frame
            mirrored = ObservationTable(frame.assign(latitude=-frame["latitude"]))
            all_of_them, plausible = self._checked(mirrored, time, frames)
            self.flipped += int(all_of_them.mask.sum() - plausible.mask.sum())
        return GriddedObservations.stack([passed])

    def counts(self) -> dict[str, list[int]]:
        """Return how many cells were observed, used and rejected, each as a list over times."""
        used = [
            observed - rejected
            for observed, rejected in zip(self.observed, self.rejected, strict=True)
        ]
        return {
            "observed_cells": self.observed,
            "used_cells": used,
            "rejected_cells": self.rejected,
        }

    def state(self) -> dict[str, Any]:
        """Return all counts as plain values, for `restore`."""
        return {
            "observed": list(self.observed),
            "rejected": list(self.rejected),
            "flipped": self.flipped,
            "by_channel": self._by_channel.tolist(),
            "squares": self._squares.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the counts of `state`."""
        self.observed, self.rejected = list(state["observed"]), list(state["rejected"])
        self.flipped, self._by_channel = state["flipped"], torch.tensor(state["by_channel"])
        self._squares = torch.tensor(state["squares"], dtype=torch.float64)

    def departures(self) -> Tensor:
        """Return RMS departures (C,), divided by the standard deviation that both errors imply.

        Of the cells that passed the gross check; NaN where there is none.
        """
        return (self._squares / self._by_channel[1]).sqrt()

    def _checked(
        self, table: ObservationTable, time: np.datetime64, frames: BackgroundFrames
    ) -> tuple[GriddedObservations, GriddedObservations]:
        gridded = grid_table(
            table,
            self.grid,
            self.channels,
            time,
            window_hours=WINDOW_HOURS,
            representativeness_sd=self.representativeness,
            background=frames if self.interpolates else None,
        )
        return gridded, gross_check(gridded, frames.current, self.background_sd, self.factor)

    def require_plausible(self) -> None:
        """Refuse reports of which one channel has lost every observation to the gross check.

        Raises:
            GatesError: The message names the channel.
        """
        for name, observed, passed in zip(
            self.channels.labels, *self._by_channel.tolist(), strict=True
        ):
            if observed >= HOPELESS_COUNT and not passed:
                raise GatesError(
                    f"the gross check rejects all {observed} observed cells of {name}: nothing is "
                    "written; bring reports and background to SI units, or set --gross_check"
                )

    def misfit(self) -> str:
        """Return one line where departures are much smaller or larger than errors let expect."""
        labeled = zip(
            self.channels.labels, self._by_channel[1].tolist(), self.departures().tolist(),
            strict=True,
        )  # fmt: skip
        far = [
            f"{size:.2f} ({label})"
            for label, count, size in labeled
            if count >= GUESSED_COUNT and not FITTING[0] <= size <= FITTING[1]
        ]
        if not far:
            return ""
        return (
            f"warning: departures from the background are {', '.join(far)} times what the errors "
            "of both let expect: give another --task, or --background_error for a network"
        )

    def warning(self) -> str:
        """Return one line if suspiciously many were rejected; else nothing.

        It names likely causes where enough were observed and enough of them rejected.
        """
        rejected, observed = sum(self.rejected), sum(self.observed)
        if rejected < SUSPICIOUS_COUNT or rejected <= SUSPICIOUS_SHARE * observed:
            return ""
        line = f"warning: {rejected} of {observed} observed cells are rejected by the gross check"
        if observed < GUESSED_COUNT or rejected < GUESSED_SHARE * observed:
            return line
        causes = "other units than SI, latitudes of the wrong sign, or another time than stated"
        if self.flipped < rejected / 2:
            causes = f"latitudes of the wrong sign, with which only {self.flipped} would be"
        return f"{line}; likely causes: {causes}"

    def analyze(
        self,
        assimilator: Assimilator,
        states: Tensor,
        times: np.ndarray,
        progress: Progress = silent,
    ) -> Analyses:
        """Analyze every background (T,C,H,W) independently.

        Raises:
            GatesError: Reports are to be compared at their own time with a single background, or
                an analysis is not finite.
        """
        analyses = []
        method = WhereObserved(assimilator)
        with progress("analyzing", len(times)) as tick:
            for number, (state, time) in enumerate(zip(states, times, strict=True)):
                around = neighbors(states, times, number) if self.own_time else None
                seen = self.at(time, state, around)
                analyses.append(method.analyze(state[None, None], seen)[0, 0])
                tick()
        return self._done(torch.stack(analyses), times)

    def cycle(
        self,
        assimilator: Assimilator,
        forecast: Forecast,
        state: Tensor,
        times: np.ndarray,
        hours: float,
        progress: Progress = silent,
    ) -> Analyses:
        """Start a cycle from a background (C,H,W); every analysis starts the next forecast."""
        current, model = iter(times), remembering(forecast)

        def check(_: GriddedObservations, background: Tensor) -> GriddedObservations:
            return self.against(model, next(current), background[0], hours)

        cycle = Cycle(model, WhereObserved(assimilator), hours, quality_control=check)
        nothing = GriddedObservations.absent((1, *state.shape))
        analyses = []
        with progress("cycling", len(times)) as tick, torch.no_grad():
            for step in cycle.run(state[None, None], [nothing] * len(times)):
                analyses.append(step.analysis[0, 0].clone())
                tick()
        return self._done(torch.stack(analyses), times)

    def against(
        self, model: Remembering, time: np.datetime64, background: Tensor, hours: float
    ) -> GriddedObservations:
        """Return `at` for the last forecast (C,H,W) of a model, a cycle of hours long."""
        return self.at(time, background, model.around(background, hours) if self.own_time else None)

    def _done(self, states: Tensor, times: np.ndarray) -> Analyses:
        """Return the analyses.

        Raises:
            GatesError: One of them is not finite.
        """
        bad = ~states.isfinite().flatten(1).all(1).numpy()
        if bad.any():
            stamp = np.datetime_as_string(times[bad][0], unit="m")
            raise GatesError(
                f"{int(bad.sum())} of {len(bad)} analyses are not finite, the first of {stamp}: "
                "check the weights, the forecast model and the observation errors"
            )
        return Analyses(states, times, self.observed, self.rejected)


class Remembering:
    """A forecast model that knows what its last forecast started from.

    Args:
        forecast: The model.
    """

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._start: Tensor | None = None
        self._before: Tensor | None = None

    def __call__(self, states: Tensor, hours: float, previous: Tensor | None = None) -> Tensor:
        """Return the states (N,C,H,W) some hours later."""
        self._start, self._before = states, previous
        return advance(self._forecast, states, hours, previous)

    def around(self, background: Tensor, hours: float) -> BackgroundFrames:
        """Return frames at both ends of the window of reports, and between them.

        A model that steps over the end of the window is asked for the end of its step.

        Args:
            background: (C,H,W), the last forecast, or what a cycle starts from.
            hours: Length of that forecast.
        """
        ahead = WINDOW_HOURS
        if isinstance(self._forecast, FramesForecast) and ahead % self._forecast.step_hours:
            ahead = self._forecast.step_hours * math.ceil(ahead / self._forecast.step_hours)
        frames = {0.0: background}
        frames[ahead] = advance(self._forecast, background[None], ahead, self._start)[0]
        if self._start is not None and ahead == WINDOW_HOURS <= hours:
            frames[-ahead] = advance(self._forecast, self._start, hours - ahead, self._before)[0]
        elif self._start is not None and ahead > WINDOW_HOURS:
            frames[-hours] = self._start[0]
        order = sorted(frames)
        return BackgroundFrames(torch.stack([frames[hour] for hour in order]), tuple(order))


class RememberingFrames(Remembering):
    """The same for a model that starts from two states.

    Args:
        forecast: The model.
    """

    def __init__(self, forecast: FramesForecast) -> None:
        super().__init__(forecast)
        self.frames, self.step_hours = forecast.frames, forecast.step_hours


def remembering(forecast: Forecast) -> Remembering:
    """Return the model with a memory, as one of as many frames."""
    if isinstance(forecast, FramesForecast):
        return RememberingFrames(forecast)
    return Remembering(forecast)


def neighbors(states: Tensor, times: np.ndarray, number: int) -> BackgroundFrames:
    """Return one of T backgrounds with the ones just before and after it.

    Args:
        states: (T,C,H,W).
        times: (T,), ascending.
        number: Which one.

    Raises:
        GatesError: There is none within 12 hours.
    """
    hours = (times - times[number]) / np.timedelta64(1, "h")
    near = [n for n in (number - 1, number, number + 1) if 0 <= n < len(times)]
    near = [n for n in near if abs(hours[n]) <= FRAMES_APART_HOURS]
    if len(near) < 2:
        raise GatesError(
            f"no other background lies within {FRAMES_APART_HOURS:g} h of "
            f"{np.datetime_as_string(times[number], unit='m')}, expected one so that reports can "
            "be compared at their own time: give more times, or compare at that of the analysis"
        )
    return BackgroundFrames(states[near], tuple(float(hours[n]) for n in near))


class WhereObserved:
    """A method that is called only where something was observed: elsewhere the background stays.

    Args:
        assimilator: The method; a network alters its background a little even without observations.
    """

    def __init__(self, assimilator: Assimilator) -> None:
        self.assimilator, self.members = assimilator, assimilator.members

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B,M,C,H,W); the background if no timeline has an observation."""
        if not bool(observations.mask.any()):
            return background.clone()
        return self.assimilator.analyze(background, observations).to(background)


def by_channel(
    given: Mapping[str, float], channels: ChannelSpec, default: Tensor, option: str
) -> Tensor:
    """Return numbers by variable as (C,), with a default (C,) where a variable is not named.

    Raises:
        GatesError: A variable is none of the channels, or a number is not positive.
    """
    names = (*channels.surface, *channels.upper)
    unknown = [name for name in given if name not in names]
    if unknown or not all(0 < value < torch.inf for value in given.values()):
        raise GatesError(
            f"--{option} {dict(given)} cannot be used: give positive numbers for "
            f"{', '.join(names)}, or some of them"
        )
    errors = default.clone()
    for channel, (name, _) in enumerate(channels):
        if name in given:
            errors[channel] = given[name]
    return errors
