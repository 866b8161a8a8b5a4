"""A period of time."""

from typing import NamedTuple, Self

import numpy as np
import pandas as pd

from core_gates.errors import GatesError

Times = pd.Series | np.datetime64


class Period(NamedTuple):
    """Times from ``start`` up to, but not including, ``end``, UTC; None for no limit."""

    start: np.datetime64 | None = None
    end: np.datetime64 | None = None

    @classmethod
    def parse(cls, start: str | None, end: str | None) -> Self:
        """Read a period that the user states.

        Raises:
            GatesError: A time is unreadable, or the end is not after the start.
        """
        period = cls(_time(start, "start"), _time(end, "end"))
        if period.start is not None and period.end is not None and period.end <= period.start:
            raise GatesError(f"--end {end} is not after --start {start}: exchange them")
        return period

    def holds(self, times: Times) -> np.ndarray | np.bool_:
        """Return whether times lie in the period."""
        found = np.ones(np.shape(times), dtype=bool)
        if self.start is not None:
            found &= np.asarray(times >= self.start)
        if self.end is not None:
            found &= np.asarray(times < self.end)
        return found

    def widened(self, *, days: int) -> Self:
        """Return the period with days more at both ends."""
        more = np.timedelta64(days, "D")
        start = None if self.start is None else self.start - more
        return self._replace(start=start, end=None if self.end is None else self.end + more)

    def __str__(self) -> str:
        shown = ["any time" if one is None else str(one)[:16] for one in self]
        return f"{shown[0]} to {shown[1]}"


def _time(text: str | None, option: str) -> np.datetime64 | None:
    if text is None:
        return None
    try:
        stamp = pd.to_datetime(text, utc=True, format="ISO8601")
    except ValueError as error:
        raise GatesError(f"--{option} {text!r} is no time, write it as 2017-01-01T00:00") from error
    if stamp is pd.NaT:
        raise GatesError(f"--{option} {text!r} is no time, write it as 2017-01-01T00:00")
    return np.datetime64(stamp.tz_localize(None).isoformat(), "ns")
