"""What a column that orders the rows may hold."""

import polars as pl

from core_gates.errors import GatesError


def check_times(column: pl.Series) -> None:
    """Refuse a column of times whose values have no order.

    Raises:
        GatesError: It holds lists, arrays, structs or objects.
    """
    if column.dtype.is_nested() or column.dtype == pl.Object:
        raise GatesError(
            f"column {column.name!r} has type {column.dtype}, a time must be a number, a date or "
            "text: name another column, or make it one"
        )
