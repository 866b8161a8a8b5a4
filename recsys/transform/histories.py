"""List columns: the newest events of each row, in rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.text import EVENTS, is_text, split_events, without_words
from recsys.schema import History
from recsys.transform.fitting import Table
from recsys.vocabulary import MISSING


def encode_history(
    column: pl.Series,
    history: History,
    table: Table,
    out: NDArray[np.int64],
    missing: Sequence[str] = (),
) -> None:
    """Write the rows of the newest events to ``out`` (N, L), newest last, 1 in front of them.

    Args:
        column: (N,) lists of values, newest last, or text with ``|`` between them; null is an
            empty list.
        history: Its feature.
        table: Of the feature whose values the lists hold.
        out: (N, L), L the ``max_length`` of the feature.
        missing: Words in text that stand for missing values; such an event keeps its place.

    Raises:
        GatesError: The column holds no lists.
    """
    out[:] = MISSING
    if column.dtype == pl.Null:
        return
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if is_text(column.dtype):
        column = split_events(column)
    if not isinstance(column.dtype, pl.List):
        raise GatesError(
            f"column {column.name!r} has type {column.dtype}, a history needs lists, or text with "
            f"{EVENTS!r} between the values"
        )
    column = without_words(column, missing)
    lengths = column.list.len().fill_null(0).cast(pl.Int64).to_numpy()
    events = column.filter(pl.Series(lengths > 0)).list.tail(history.max_length).explode()
    rows = table.lookup(events.rename(column.name))
    kept = np.minimum(lengths, history.max_length)
    ends = np.cumsum(kept)
    owner = np.repeat(np.arange(len(kept)), kept)
    place = history.max_length - ends[owner] + np.arange(len(owner))
    out[owner, place] = rows
