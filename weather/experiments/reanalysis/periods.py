"""Disjoint periods for training, validation and testing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from core_gates.errors import GatesError

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
    found = Periods(*(np.flatnonzero(kept == role) for role in (TRAINING, VALIDATION, HELD_OUT)))
    for name, positions in found._asdict().items():
        if not len(positions):
            first, last = (np.datetime_as_string(times[end], unit="D") for end in (0, -1))
            raise GatesError(
                f"no time is left for {name} among {len(times)} times from {first} to {last}: give "
                "a store of more times, or other --data.validation and --data.held_out"
            )
    return found


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
