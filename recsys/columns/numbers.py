"""A numeric column as floats, however a file or a request writes it."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.row_error import RowError
from recsys.columns.text import truth_of


def numbers_of(column: pl.Series) -> NDArray[np.float64]:
    """Return a column as float64 (N,), NaN where it is missing.

    Args:
        column: (N,) numbers, booleans, or strings that hold numbers, or true and false. Null,
            NaN, infinities and empty strings are missing.

    Raises:
        RowError: A string holds no number.
        GatesError: The type holds no numbers.
    """
    dtype = column.dtype
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        column = _read(column.cast(pl.String))
    elif not (dtype.is_numeric() or dtype in (pl.Boolean, pl.Null)):
        advice = ", such as with pl.col(name).dt.epoch('ms')" if dtype.is_temporal() else ""
        raise GatesError(
            f"column {column.name!r} has type {dtype}, a number was expected: make it one{advice}"
        )
    numbers = column.cast(pl.Float64)
    if numbers.null_count():
        numbers = numbers.fill_null(np.nan)
    found = numbers.to_numpy()
    if dtype.is_integer() or np.isfinite(found).all():
        return found
    return np.where(np.isfinite(found), found, np.nan)


def _read(text: pl.Series) -> pl.Series:
    read = text.cast(pl.Float64, strict=False)
    if read.null_count() == text.null_count():
        return read
    stripped = text.str.strip_chars()
    read = stripped.cast(pl.Float64, strict=False)
    if read.null_count() > text.null_count():
        read = read.fill_null(truth_of(text))
    unread = read.is_null() & (stripped != "").fill_null(False)
    if unread.any():
        row = int(unread.arg_max() or 0)
        raise RowError(text.name, row, f"{text[row]!r} is no number; correct or empty it")
    return read
