"""Whether values can be what their name says."""

from __future__ import annotations

from core_gates.errors import GatesError
from weather.variables import VARIABLES, Variable

FILL_VALUE_SIZE = 1e15  # nothing physical is as large; fill values are 1e20 or 9.97e36


def check_range(name: str, low: float, high: float) -> None:
    """Refuse a field whose values are those of another unit, or of nothing physical.

    Args:
        name: WeatherBench-2 name; of other names only fill values are refused.
        low: Its smallest value.
        high: Its largest value.

    Raises:
        GatesError: The range is impossible.
    """
    found = f"{name} ranges from {low:.6g} to {high:.6g}"
    if max(abs(low), abs(high)) > FILL_VALUE_SIZE:
        raise GatesError(
            f"{found}, which is a fill value; set the attribute _FillValue so that it is masked"
        )
    variable = VARIABLES.get(name)
    if variable is None:
        return
    expected = f"{found}, expected {variable.low:g} to {variable.high:g} {variable.unit}"
    other = variable.wrong_unit(low, high)
    if other is not None:
        raise GatesError(f"{expected}; it looks like {other.name}: {other.fix}")
    if not _within_twice(variable, low, high):
        raise GatesError(f"{expected}; check its unit and its scale_factor")


def _within_twice(variable: Variable, low: float, high: float) -> bool:
    """Fields may exceed the plausible range of single values by half its width on each side."""
    margin = (variable.high - variable.low) / 2
    return variable.low - margin <= low and high <= variable.high + margin
