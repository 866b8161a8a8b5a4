"""Values of a categorical column in one form, however a file or a request writes them.

A column is of kind ``integer`` or ``string``, decided by the training table. As integers, ``7``,
``7.0`` and ``"7"`` are equal, and so are ``1``, ``True`` and ``"true"`` in any case; as strings,
``7``, ``7.0`` and ``"7"`` are.

Missing are null, NaN, infinities, the empty string and, as integers, all negative numbers: data
sets write -1, -124 and the like where they know nothing. Negative categories that mean something
are kept in a column of strings.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.hashing import hash_strings
from recsys.columns.row_error import RowError
from recsys.columns.text import truth_of

Kind = Literal["integer", "string"]
Keys = NDArray[np.int64]

MISSING = -1
UNREADABLE = 2**63 - 1
"""Stands for a value that is no integer, where integers are expected; in no vocabulary."""


def kind_of(name: str, dtype: pl.DataType) -> Kind | None:
    """Return the kind of a column; None where all is null.

    Raises:
        GatesError: Values of the type are no categories.
    """
    if dtype == pl.Null:
        return None
    if dtype.is_numeric() or dtype == pl.Boolean:
        return "integer"
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return "string"
    advice = "pl.col(name).dt.strftime(...)" if dtype.is_temporal() else "cast(pl.String)"
    raise GatesError(
        f"column {name!r} has type {dtype}, a sparse feature needs integers or strings: make it "
        f"so, as with {advice}"
    )


def canonical(column: pl.Series, kind: Kind) -> pl.Series:
    """Return the values of a column (N,) as Int64 or String, without nulls.

    Args:
        column: (N,) integers, floats, decimals, booleans, strings or categories.
        kind: ``integer``: negative where missing, :data:`UNREADABLE` where it is no integer;
            ``string``: empty where missing.

    Raises:
        GatesError: Values of the type are no categories.
    """
    if kind_of(column.name, column.dtype) is None:
        column = column.cast(pl.Int64 if kind == "integer" else pl.String)
    if column.dtype.is_decimal():
        column = _of_decimals(column)
    return _integers(column) if kind == "integer" else _strings(column)


def keys_of(values: pl.Series) -> tuple[Keys, NDArray[np.bool_]]:
    """Return 64 bits that stand for each of the :func:`canonical` values, and where one is missing.

    Returns:
        Integers as they are or hashes of strings (N,); (N,) true where missing.
    """
    if values.dtype == pl.String:
        return hash_strings(values).view(np.int64), (values == "").to_numpy()
    keys = values.to_numpy()
    return keys, keys < 0


def keys_of_ids(column: pl.Series, *, checked: bool = True) -> tuple[Keys, NDArray[np.bool_]]:
    """Return :func:`keys_of` a column that tells whose a row is, in the kind of its type.

    Args:
        column: (N,) integers or text.
        checked: Whether other numbers than integers are refused; else all of them are one.

    Raises:
        RowError: A number has a fraction or exceeds 2^63 - 1.
        GatesError: Values of the type are no categories.
    """
    kind = kind_of(column.name, column.dtype) or "integer"
    keys, missing = keys_of(canonical(column, kind))
    if checked and kind == "integer" and (wrong := keys == UNREADABLE).any():
        row = int(wrong.argmax())
        raise RowError(
            column.name,
            row,
            f"{column[row]} is no whole number below 2^63, as what identifies users and the like "
            "must be: write it as text or as another number",
        )
    return keys, missing


def _of_decimals(column: pl.Series) -> pl.Series:
    """Return decimal numbers as integers where they have no digits after the point, else floats."""
    if column.dtype.scale:  # type: ignore[attr-defined]
        return column.cast(pl.Float64)
    return column.cast(pl.Int128)


def _integers(column: pl.Series) -> pl.Series:
    dtype = column.dtype
    if dtype.is_float():
        return pl.Series(column.name, _whole(column))
    if dtype.is_integer() or dtype == pl.Boolean:
        read = column if dtype == pl.Int64 else column.cast(pl.Int64, strict=False)
        if read.null_count() > column.null_count():  # above 2^63 - 1
            read = _where(column.is_not_null() & read.is_null(), UNREADABLE, read)
        return read.fill_null(MISSING) if read.null_count() else read
    text = column if dtype == pl.String else column.cast(pl.String)
    read = text.cast(pl.Int64, strict=False)
    unread = read.is_null() & text.is_not_null() & (text != "")
    if unread.any():
        text = text.set(~unread, None)
        numbers = text.cast(pl.Float64, strict=False)
        numbers = numbers.fill_null(truth_of(text))
        numbers = numbers.set(unread & numbers.is_null(), 0.5)  # no number, hence no integer
        read = read.zip_with(~unread, pl.Series(column.name, _whole(numbers)))
    return read.fill_null(MISSING)


def _where(chosen: pl.Series, value: int, other: pl.Series) -> pl.Series:
    return other.zip_with(~chosen, pl.Series([value], dtype=pl.Int64).new_from_index(0, len(other)))


def _whole(column: pl.Series) -> Keys:
    """Return floats as integers (N,)."""
    numbers = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
    finite = np.isfinite(numbers)
    whole = finite & (np.abs(numbers) < 2.0**63) & (numbers == np.trunc(numbers))
    found = np.where(whole, numbers, 0.0).astype(np.int64)
    return np.where(whole, found, np.where(finite, UNREADABLE, MISSING))


def _strings(column: pl.Series) -> pl.Series:
    if column.dtype.is_float():
        whole = _whole(column)
        text = pl.Series(column.name, whole).cast(pl.String)
        if (fractions := whole == UNREADABLE).any():
            text = text.zip_with(pl.Series(~fractions), column.cast(pl.Float64).cast(pl.String))
        finite = column.is_finite().fill_null(False)
        return (
            text
            if finite.all()
            else text.zip_with(finite, pl.Series([""]).new_from_index(0, len(text)))
        )
    text = column if column.dtype == pl.String else column.cast(pl.String)
    return text.fill_null("") if text.null_count() else text
