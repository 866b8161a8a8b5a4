"""Values of a column in one form, however a file or a request writes them.

Categories, numbers, times, all in UTC, with their hours and weekdays, and text that stands for
something else: missing values, lists, true and false.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.hashing import hash_strings


class RowError(GatesError):
    """A column has a value that cannot be read in some row.

    Readers of files catch it and add the file and the line.

    Args:
        column: Name of the column.
        row: First such row, from 0.
        problem: What was found and what was expected.
        where: Name of the table, such as a file; left out of the message if empty.
        counted: How rows are called: ``row`` from 0, or ``line`` of a file.
    """

    def __init__(
        self, column: str, row: int, problem: str, where: str = "", counted: str = "row"
    ) -> None:
        place = f"{where}, " if where else ""
        super().__init__(f"{place}{counted} {row}, column {column!r}: {problem}")
        self.column, self.row, self.problem = column, row, problem
        self._given = column, row, problem, where, counted

    def __reduce__(self) -> tuple[type[RowError], tuple[str, int, str, str, str]]:
        """Tell pickle the arguments, so that worker processes can report the error."""
        return RowError, self._given

    def shifted(self, rows: int) -> RowError:
        """Return the error of a table that has ``rows`` rows before these."""
        return RowError(self.column, self.row + rows, self.problem)


EVENTS = "|"
"""Between the values of a list in text."""

_TRUTH = {"true": 1.0, "false": 0.0}


def is_text(dtype: pl.DataType) -> bool:
    """Return whether values of a type are text."""
    return dtype in (pl.String, pl.Categorical, pl.Enum)


def without_words(column: pl.Series, words: Sequence[str]) -> pl.Series:
    """Return a column, null where it holds one of the words; so in lists, too.

    Args:
        column: (N,) of any type; only text and lists of text can hold words.
        words: Those that stand for missing values, such as ``NA``.
    """
    if not words:
        return column
    if isinstance(column.dtype, pl.List) and is_text(column.dtype.inner):  # type: ignore[arg-type]
        as_text = pl.element().cast(pl.String)
        kept = pl.when(as_text.is_in(list(words))).then(None).otherwise(as_text)
        return column.list.eval(kept)
    if not is_text(column.dtype):
        return column
    text = column.cast(pl.String)
    return text.set(text.is_in(list(words)).fill_null(False), None)


def stripped(column: pl.Series, words: Sequence[str] = ()) -> pl.Series:
    """Return text (N,) without spaces around it, null where nothing or one of the words is left.

    Quotes after a space, as in ``1, "x"``, are no part of the value either.
    """
    text = column.str.strip_chars()
    changed = (text != column).fill_null(False)
    if changed.any():
        quoted = changed & text.str.contains('^".*"$').fill_null(False)
        if quoted.any():
            inner = text.str.slice(1).str.head(-1).str.replace_all('""', '"', literal=True)
            text = inner.zip_with(quoted, text)
    return without_words(text, ["", *words])


def split_events(column: pl.Series) -> pl.Series:
    """Return text such as ``3|1|4`` (N,) as lists of text, null where it is empty.

    Spaces around values do not count.
    """
    text = column.cast(pl.String).str.strip_chars()
    lists = text.set((text == "").fill_null(False), None).str.split(EVENTS)
    return lists.list.eval(pl.element().str.strip_chars())


def truth_of(text: pl.Series) -> pl.Series:
    """Return 1 and 0 for the words true and false (N,), in any case; null for all others."""
    lower = text.str.strip_chars().str.to_lowercase()
    return lower.replace_strict(_TRUTH, default=None, return_dtype=pl.Float64)


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
    array = numbers.to_numpy()
    if dtype.is_integer() or np.isfinite(array).all():
        return array
    return np.where(np.isfinite(array), array, np.nan)


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
        kind: ``integer``: negative where missing, `UNREADABLE` where it is no integer;
            ``string``: empty where missing.

    Raises:
        GatesError: Values of the type are no categories.
    """
    if kind_of(column.name, column.dtype) is None:
        column = column.cast(pl.Int64 if kind == "integer" else pl.String)
    if column.dtype.is_decimal():  # integers where they have no digits after the point
        column = column.cast(pl.Float64 if column.dtype.scale else pl.Int128)  # type: ignore[attr-defined]
    return _integers(column) if kind == "integer" else _strings(column)


def keys_of(values: pl.Series) -> tuple[Keys, NDArray[np.bool_]]:
    """Return 64 bits that stand for each of the `canonical` values, and where one is missing.

    Returns:
        Integers as they are or hashes of strings (N,); (N,) true where missing.
    """
    if values.dtype == pl.String:
        return hash_strings(values).view(np.int64), (values == "").to_numpy()
    keys = values.to_numpy()
    return keys, keys < 0


def keys_of_ids(column: pl.Series, *, checked: bool = True) -> tuple[Keys, NDArray[np.bool_]]:
    """Return int64 keys of the ids in a column, and where they are missing.

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


def _integers(column: pl.Series) -> pl.Series:
    dtype = column.dtype
    if dtype.is_float():
        return pl.Series(column.name, _whole(column))
    if dtype.is_integer() or dtype == pl.Boolean:
        read = column if dtype == pl.Int64 else column.cast(pl.Int64, strict=False)
        if read.null_count() > column.null_count():  # above 2^63 - 1
            read = read.set(column.is_not_null() & read.is_null(), UNREADABLE)
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


def _whole(column: pl.Series) -> Keys:
    """Return floats as integers (N,)."""
    numbers = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
    finite = np.isfinite(numbers)
    whole = finite & (np.abs(numbers) < 2.0**63) & (numbers == np.trunc(numbers))
    integers = np.where(whole, numbers, 0.0).astype(np.int64)
    return np.where(whole, integers, np.where(finite, UNREADABLE, MISSING))


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


SECONDS = 946_684_800, 2_051_222_400  # of the years 2000 to 2034 since 1970
READABLE = 0.95  # of the values that are not missing, from which a column holds times
_DATE = r"^\s*\d{4}[-/]"
_FORMATS = tuple(
    f"%Y-%m-%d{rest}" for rest in ("", " %H:%M", " %H:%M%#z", " %H:%M:%S%.f", " %H:%M:%S%.f%#z")
)


def part_of(column: pl.Series, part: str) -> pl.Series:
    """Return the hour (0 to 23) or the weekday (1 to 7, Monday first) of times, in UTC.

    Args:
        column: (N,) dates; seconds or milliseconds since 1970, of the years 2000 to 2034, as
            numbers or text; or text in ISO 8601. Dates and text without a zone are in UTC.
        part: Of the times; empty for the column as it is.

    Returns:
        Int64 (N,): null where the time is missing or a number that is 0 or negative,
        ``UNREADABLE`` where there is another value.

    Raises:
        GatesError: The column holds neither dates nor numbers nor text.
    """
    if not part:
        return column
    seconds = _seconds(column)
    made = seconds // 3600 % 24 if part == "hour" else (seconds // 86_400 + 3) % 7 + 1
    return made.set(seconds == UNREADABLE, UNREADABLE)


def holds_times(column: pl.Series) -> bool:
    """Return whether nearly all values of a column that are not missing can be read as times."""
    try:
        seconds = _seconds(column).drop_nulls()
    except GatesError:
        return False
    return bool(len(seconds)) and float((seconds != UNREADABLE).mean()) >= READABLE  # type: ignore[arg-type]


def form_of(times: pl.Series) -> str:
    """Return how a column (N,) tells times, such as in seconds since 1970 or as text."""
    if not times.dtype.is_numeric():
        return "text" if is_text(times.dtype) else str(times.dtype)
    middle = float(times.filter(times > 0).median() or 0)  # type: ignore[arg-type]
    place = int(np.searchsorted(np.outer([1, 1000], SECONDS).ravel(), middle, "right"))
    rest = "other numbers" if middle else str(pl.Null)
    return {1: "seconds", 3: "milliseconds"}.get(place, rest)


def _seconds(column: pl.Series) -> pl.Series:
    """Return times (N,) in whole seconds since 1970, see `part_of`."""
    if column.dtype in (pl.Date, pl.Datetime):
        return column.dt.epoch("s")
    whole = column.floor() if column.dtype.is_float() or column.dtype.is_decimal() else column
    if is_text(column.dtype):
        whole = column.cast(pl.String).str.replace(r"^\s*(\d+)\.\d*\s*$", "$1")
    number, (first, last), read = canonical(whole, "integer"), SECONDS, []
    if is_text(column.dtype) and column.cast(pl.String).str.contains(_DATE).any():
        text = column.cast(pl.String).str.replace_all("/", "-").str.replace(r"(\d)T(\d)", "$1 $2")
        text = text.str.strip_chars().str.replace(" ?(UTC|Z)$", "Z")
        kind = pl.Datetime("us", "UTC")
        read = [text.str.strptime(kind, form, strict=False).dt.epoch("s") for form in _FORMATS]
    return pl.select(
        pl.when(number <= 0)
        .then(None)
        .when(number.is_between(first, last, "left"))
        .then(number)
        .when(number.is_between(first * 1000, last * 1000, "left"))
        .then(number // 1000)
        .otherwise(pl.coalesce(*read, pl.lit(UNREADABLE)))
        .alias(column.name)
    ).to_series()
