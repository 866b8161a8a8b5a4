"""Disjoint periods for training, validation and testing, and the backgrounds of their times."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from weather.cycle import Forecast, advance
from weather.data.axes import dataset_grid
from weather.data.store import naming, open_wb2
from weather.data.training_cache import FrameCache, FrameLoader, store_frames
from weather.grid import Grid
from weather.state import ChannelSpec

TRAINING, VALIDATION, HELD_OUT, UNUSED = range(4)
PATTERN = (TRAINING, TRAINING, VALIDATION, TRAINING, TRAINING, HELD_OUT)
DAY = np.timedelta64(1, "D")
YEARS, MONTHS = 3 * 365, 180  # days from which on whole years and months are dealt


class Periods(NamedTuple):
    """Positions of times, ascending: for training, for validation, and held out for scores."""

    training: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def split_times(
    times: np.ndarray,
    validation: Sequence[str | int] = (),
    held_out: Sequence[str | int] = (),
    gap_days: float = 2.0,
) -> Periods:
    """Divide times into disjoint periods.

    By default, of three years or more the last is held out and the one before it validates; of half
    a year or more, every sixth month is held out and the third of every six validates; of less,
    sixths of the whole do. Next to another period, ``gap_days`` (a tenth of a block at most) of the
    times that validate or are held out are left out.

    Args:
        times: (T,) datetime64, ascending.
        validation: Periods that validate, such as ``2020``, ``2020-03`` or
            ``2020-03-10/2020-04-20``, the end included; both kinds or none are given.
        held_out: Periods that are held out.
        gap_days: Days left out.

    Raises:
        GatesError: A period cannot be read, overlaps another, or holds no time.
    """
    if gap_days < 0 or bool(validation) != bool(held_out):
        raise GatesError(
            f"found validation {list(validation)}, held_out {list(held_out)} and gap_days "
            f"{gap_days:g}, expected periods of both kinds or of none, and a gap of 0 or more: "
            "give both --data.validation and --data.held_out, such as '[2019]' and '[2020]'"
        )
    if validation:
        roles, block = _given(times, validation, held_out), np.inf
    else:
        roles, block = _dealt(times)
    gap = min(gap_days, block / 10) * DAY.astype("timedelta64[s]")
    kept = roles.copy()
    for edge in np.flatnonzero(roles[1:] != roles[:-1]):
        for role, near in (
            (roles[edge], times > times[edge] - gap),
            (roles[edge + 1], times < times[edge + 1] + gap),
        ):
            side = np.arange(len(times)) <= edge
            side = side if role == roles[edge] else ~side
            if role != TRAINING:
                kept[side & near & (roles == role)] = UNUSED
    periods = Periods(*(np.flatnonzero(kept == role) for role in (TRAINING, VALIDATION, HELD_OUT)))
    for name, positions in periods._asdict().items():
        if not len(positions):
            first, last = (np.datetime_as_string(times[end], unit="D") for end in (0, -1))
            raise GatesError(
                f"no time is left for {name} among {len(times)} times from {first} to {last}: give "
                "a store of more times, or other --data.validation and --data.held_out"
            )
    return periods


def _given(
    times: np.ndarray, validation: Sequence[str | int], held_out: Sequence[str | int]
) -> np.ndarray:
    roles = np.full(len(times), TRAINING)
    for role, periods in ((VALIDATION, validation), (HELD_OUT, held_out)):
        for text in periods:
            start, end = _bounds(str(text))
            inside = (times >= start) & (times < end)
            if not inside.any():
                raise GatesError(f"the period {text} holds no time of the store: choose another")
            if (roles[inside] != TRAINING).any() and (roles[inside] != role).any():
                raise GatesError(f"the period {text} overlaps one that validates: choose another")
            roles[inside] = role
    return roles


def _bounds(text: str) -> tuple[np.datetime64, np.datetime64]:
    first, _, last = text.partition("/")
    try:
        start, end = np.datetime64(first.strip()), np.datetime64((last or first).strip())
        return start.astype("datetime64[s]"), (end + 1).astype("datetime64[s]")
    except ValueError as error:
        raise GatesError(
            f"the period {text!r} cannot be read: write 2020, 2020-03 or 2020-03-10/2020-04-20"
        ) from error


def _dealt(times: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the role of every time, and the days of a block."""
    span = float((times[-1] - times[0]) / DAY)
    if span >= YEARS:
        years, counts = np.unique(times.astype("datetime64[Y]"), return_counts=True)
        whole = years[counts >= counts.max() / 2]
        roles = np.full(len(times), TRAINING)
        roles[times.astype("datetime64[Y]") == whole[-2]] = VALIDATION
        roles[times.astype("datetime64[Y]") >= whole[-1]] = HELD_OUT
        return roles, 365.0
    if span >= MONTHS:
        months = times.astype("datetime64[M]").astype(int)
        number, block = months - months[0], 30.0
    else:
        number, block = np.arange(len(times)) * len(PATTERN) // len(times), span / len(PATTERN)
    return np.asarray(PATTERN)[number % len(PATTERN)], block


Kind = Literal["earlier", "store", "model"]
FindModel = Callable[[str], Forecast]
"""Returns a forecast model by its name."""

HOURS = re.compile(r"(\d+(?:\.\d+)?) ?h")
STORES = (".zarr", ".nc", ".nc4", ".grib", ".grb")
GRID_TOLERANCE = 1e-4  # degrees


class Background(NamedTuple):
    """What ``data.background`` asks for.

    Attributes:
        kind: The state some hours ``earlier``, a ``store``, or a forecast ``model``.
        name: As it was given.
        hours: Between the state that the background starts from and its time; None for a store
            without leads, or its shortest one.
    """

    kind: Kind
    name: str
    hours: float | None

    @classmethod
    def of(cls, name: str, lead_hours: float | None) -> Background:
        """Return what a name asks for: ``24h``, a store, or a model.

        Raises:
            GatesError: The hours are not positive, or are given twice.
        """
        match = HOURS.fullmatch(name.strip())
        hours = float(match[1]) if match else lead_hours
        if (match and lead_hours is not None) or (hours is not None and not 0 < hours < np.inf):
            raise GatesError(
                f"found --data.background {name} with lead_hours {lead_hours}, expected hours once "
                "and positive: give --data.background 24h, or a store or a model with lead_hours"
            )
        if match:
            return cls("earlier", name, hours)
        if "://" in name or name.endswith(STORES) or Path(name).is_dir():
            return cls("store", name, hours)
        return cls("model", name, 24.0 if hours is None else hours)

    def starts(self, times: np.ndarray, roles: np.ndarray | None = None) -> np.ndarray:
        """Return the position (T,) of the state that each time's background starts from.

        Args:
            times: (T,), ascending.
            roles: (T,) number of the period of each time; both must lie in the same one.

        Returns:
            -1 where there is none.
        """
        assert self.hours is not None
        wanted = times - np.timedelta64(round(self.hours * 3600), "s")
        places = np.searchsorted(times, wanted).clip(max=len(times) - 1)
        there = times[places] == wanted
        if roles is not None:
            there &= roles[places] == roles
        return np.where(there, places, -1)


class ForecastStore:
    """A store of forecasts, or of other fields, with a background for each valid time.

    Args:
        background: Of kind ``store``.
        channels: The C channels of the truth.
        grid: Its grid.

    Attributes:
        times: (T,) valid times, ascending.

    Raises:
        GatesError: It is missing or damaged, lacks a channel or the lead, or has another grid.
    """

    def __init__(self, background: Background, channels: ChannelSpec, grid: Grid) -> None:
        self.background, self.channels = background, channels
        with self._opened() as dataset:
            held = dataset_grid(dataset)
            if not held.difference(grid) <= GRID_TOLERANCE:
                raise GatesError(
                    f"{background.name} has {held.shape[0]} latitudes and {held.shape[1]} "
                    f"longitudes from {held.latitude[0]:g} and {held.longitude[0]:g} degrees, "
                    f"expected {grid.shape[0]} and {grid.shape[1]} from {grid.latitude[0]:g} and "
                    f"{grid.longitude[0]:g}, as in --data.store: bring both to one grid"
                )
            self.times = dataset["time"].values.astype("datetime64[s]")

    def frames(self, positions: Sequence[int]) -> Iterator[Tensor]:
        """Yield blocks (N,C,H,W) of the backgrounds at some positions."""
        with self._opened() as dataset, naming(self.background.name):
            yield from store_frames(dataset, self.channels, positions)

    def _opened(self) -> xr.Dataset:
        """Open the store with valid times in place of initial ones."""
        name, hours = self.background.name, self.background.hours
        dataset = open_wb2(name, self.channels)
        with naming(name):
            if "number" in dataset.dims:
                raise GatesError("holds an ensemble, expected one state a time: select a member")
            if "prediction_timedelta" not in dataset.dims:
                if hours is not None:
                    raise GatesError("holds no forecasts: leave out --data.lead_hours")
                return dataset
            leads = dataset["prediction_timedelta"].values / np.timedelta64(1, "h")
            choices = ", ".join(f"{lead:g}" for lead in leads[leads > 0])
            wanted = min(leads[leads > 0], default=0.0) if hours is None else hours
            if wanted not in leads or not wanted:
                raise GatesError(
                    f"has no forecast of {wanted:g} h, found {choices or 'none'} h: choose one of "
                    "them by --data.lead_hours"
                )
            forecast = dataset.isel(prediction_timedelta=int(np.flatnonzero(leads == wanted)[0]))
            return forecast.drop_vars("prediction_timedelta").assign_coords(
                time=forecast["time"].values + np.timedelta64(round(wanted * 3600), "s")
            )


def model_frames(
    model: Forecast, truth: FrameCache, starts: Sequence[int], hours: float
) -> Iterator[Tensor]:
    """Yield the forecasts (C,H,W) from some states of the truth, in order.

    A model of two frames gets the state that is as much earlier, if that is its step and the truth
    has it.
    """
    before = truth.positions(
        truth.times[np.asarray(starts)] - np.timedelta64(round(3600 * hours), "s")
    ).tolist()
    with torch.no_grad():
        for state, previous in zip(FrameLoader(truth, starts), before, strict=True):
            earlier = truth[previous][None] if previous >= 0 else None
            yield advance(model, state[None], hours, earlier)[0]
