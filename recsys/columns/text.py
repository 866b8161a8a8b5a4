"""Text that stands for something else: missing values, lists, true and false."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

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
        told = pl.element().cast(pl.String)
        kept = pl.when(told.is_in(list(words))).then(None).otherwise(told)
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
