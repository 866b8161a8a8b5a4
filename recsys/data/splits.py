"""Training, validation and test rows: by time, by the hash of users, and in rolling windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from core_gates.errors import GatesError, check_at_least
from recsys.columns.canonical import RowError, check_times, keys_of_ids
from recsys.columns.hashing import bucket, combine, hash_integers

DATE = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d\S*)?$"
"""Dates, and times of days, that sort as text."""

NUMBER = r"^-?\d+(\.\d+)?$"
RESOLUTION = 2**30  # fractions of rows are exact to 1e-9


class Split(NamedTuple):
    """Three parts of a table, each in its order."""

    train: pl.DataFrame
    validation: pl.DataFrame
    test: pl.DataFrame


def split_at(table: pl.DataFrame, time: str, *, validation_from: Any, test_from: Any) -> Split:
    """Split by time: training before validation, validation before test.

    Rows may come in any order of time.

    Args:
        table: All rows.
        time: Column that orders them, numbers or dates; text if it is like 2024-01-31 08:00.
        validation_from: First time of the validation part.
        test_from: First time of the test part.

    Raises:
        GatesError: The boundaries are not ascending, the column is absent or a time is missing.
    """
    times = _times(table, time)
    if not validation_from <= test_from:
        raise GatesError(
            f"validation begins at {validation_from}, after the test part at {test_from}: give "
            "ascending times"
        )
    return _cut(table, times >= validation_from, times >= test_from)


def split_by_time(
    table: pl.DataFrame, time: str, *, validation: float = 0.1, test: float = 0.1
) -> Split:
    """Split by time, given the fractions of the last rows; equal times stay together.

    Args:
        table: All rows.
        time: Column that orders them, numbers or dates; text if it is like 2024-01-31 08:00.
        validation: Fraction of the rows, before the test part.
        test: Fraction of the rows.

    Raises:
        GatesError: Fractions leave nothing to train on, the column is absent or a time is missing.
    """
    _check_fractions(validation, test)
    times = _times(table, time)
    if not len(times):
        raise GatesError("the table has no rows that could be split")
    ordered, late = times.sort(), []
    for fraction in (validation + test, test):
        first = int(len(times) * (1 - fraction))
        late.append(times >= ordered[first] if first < len(times) else times.is_null())
    return _cut(table, *late)


def split_by_hash(
    table: pl.DataFrame,
    columns: str | Sequence[str] = (),
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> Split:
    """Split at random, rows with equal values in ``columns`` together, such as those of a user.

    A value is in the same part whatever other rows there are, on every machine. A row where it is
    missing belongs to no other and is split by its number.

    Args:
        table: All rows.
        columns: What stays together; rows are split one by one, by their number, if empty.
        validation: Fraction of the values, about.
        test: Fraction of the values, about.
        seed: Of the hash.

    Raises:
        GatesError: Fractions leave nothing to train on, or a column is absent.
        RowError: A number of a column has a fraction or exceeds 2^63 - 1.
    """
    _check_fractions(validation, test)
    names = [columns] if isinstance(columns, str) else list(columns)
    rows = np.arange(len(table))
    hashes = hash_integers(rows, seed)
    for number, name in enumerate(names):
        keys, missing = keys_of_ids(_column(table, name))
        found = hash_integers(np.where(missing, -1 - rows, keys), seed)
        hashes = combine(hashes, found) if number else found
    drawn = bucket(hashes, RESOLUTION) / RESOLUTION
    tested, validated = pl.Series(drawn < test), pl.Series(drawn < test + validation)
    return Split(table.filter(~validated), table.filter(validated & ~tested), table.filter(tested))


def rolling_windows(
    table: pl.DataFrame, period: str, *, test: int = 1, validation: int = 1, windows: int = 1
) -> Iterator[Split]:
    """Yield the splits of windows that end with the last period, the earliest window first.

    Each tests ``test`` periods, validates on those just before and trains on all earlier ones; test
    parts of two windows share no row.

    Args:
        table: All rows.
        period: Column of the period, such as a date; periods without rows are not counted.
        test: Periods of a test part.
        validation: Periods of a validation part.
        windows: Number of windows.

    Raises:
        GatesError: There are too few periods, the column is absent or a period is missing.
    """
    check_at_least(1, test=test, windows=windows)
    check_at_least(0, validation=validation)
    times = _times(table, period)
    periods = times.unique().sort()
    wanted = windows * test + validation + 1
    if len(periods) < wanted:
        raise GatesError(
            f"column {period!r} has {len(periods)} periods; {windows} windows of {test} after "
            f"{validation} of validation and one of training need {wanted}"
        )
    for left in range(windows, 0, -1):
        start = len(periods) - left * test
        kept = table.filter(times <= periods[start + test - 1])
        yield split_at(
            kept, period, validation_from=periods[start - validation], test_from=periods[start]
        )


def _cut(table: pl.DataFrame, late: pl.Series, latest: pl.Series) -> Split:
    return Split(table.filter(~late), table.filter(late & ~latest), table.filter(latest))


def _times(table: pl.DataFrame, name: str) -> pl.Series:
    column = _column(table, name)
    check_times(column)
    missing = column.is_null() | (column.is_nan() if column.dtype.is_float() else False)
    if missing.any():
        raise RowError(
            name, int(missing.arg_max() or 0), "it has no time; give one or leave the row out"
        )
    if column.dtype == pl.String and len(column):
        _require_order(column)
    return column


def _require_order(column: pl.Series) -> None:
    """Refuse text that does not sort by time: 10 before 9, or a word among dates."""
    in_order = column.str.contains(DATE)
    if not in_order[0]:
        in_order = column.str.contains(NUMBER)
        if in_order.all():
            in_order = column.str.len_bytes() == len(column[0])
    if not in_order.all():
        raise RowError(
            column.name,
            int((~in_order).arg_max() or 0),
            f"it is {column.filter(~in_order)[0]!r}: expected numbers, or dates like 2024-01-31",
        )


def _column(table: pl.DataFrame, name: str) -> pl.Series:
    if name not in table.columns:
        raise GatesError(
            f"the table has no column {name!r} to be split by; it has "
            f"{', '.join(table.columns[:12])}"
        )
    return table[name]


def _check_fractions(validation: float, test: float) -> None:
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise GatesError(
            f"validation {validation} and test {test} leave no rows to train on: give fractions "
            "that add up to less than 1"
        )
