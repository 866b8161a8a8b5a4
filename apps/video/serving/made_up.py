"""Made-up rows for a model, of values that training has seen."""

from __future__ import annotations

import numpy as np
import polars as pl

from apps.video.serving.requests import DTYPES, field_kinds
from recsys.transform import FeatureTransform
from recsys.vocabulary import Vocabulary

HASHED = 10_000  # values of a column without vocabulary


def made_up(transform: FeatureTransform, count: int, seed: int = 0) -> pl.DataFrame:
    """Return rows with a value in every field.

    Args:
        transform: Of the model. Values of its vocabularies are drawn evenly, lengths of histories,
            too; numbers are log-normal with median 7.
        count: Number of rows.
        seed: Of the random numbers.
    """
    draw = np.random.default_rng(seed)
    histories = {history.name: history for history in transform.schema.sequences}
    columns = []
    for name, kind in field_kinds(transform).items():
        if name in histories:
            history = histories[name]
            lengths = draw.integers(0, history.max_length + 1, count)
            values = _values(transform, history.of, int(lengths.sum()), draw)
            ends = np.cumsum(lengths)
            lists = [values[end - n : end].to_list() for n, end in zip(lengths, ends, strict=True)]
            columns.append(pl.Series(name, lists, DTYPES[kind]))
        elif kind == "number":
            columns.append(pl.Series(name, np.exp(draw.normal(2, 1, count)).round(2)))
        else:
            columns.append(_values(transform, name, count, draw).rename(name))
    return pl.DataFrame(columns)


def _values(
    transform: FeatureTransform, name: str, count: int, draw: np.random.Generator
) -> pl.Series:
    """Return values of a sparse feature."""
    table = transform.tables[transform.sparse_tables[name]]
    if isinstance(table, Vocabulary):
        if not len(table.values):
            return pl.Series(name, [None] * count, table.values.dtype)
        return table.values[draw.integers(0, len(table.values), count)]
    numbers = pl.Series(name, draw.integers(0, HASHED, count))
    return numbers if table.kind == "integer" else numbers.cast(pl.String)
