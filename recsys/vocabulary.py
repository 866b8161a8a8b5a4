"""The values of a categorical column and their rows of an embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least
from harness.files import replacing
from recsys.columns.canonical import UNREADABLE, Kind, RowError, canonical, keys_of, kind_of
from recsys.columns.hashing import RowIndex, bucket, hash_integers

Rows = NDArray[np.int64]

UNKNOWN, MISSING, FIRST = 0, 1, 2
"""Row of values not seen in training, row of missing ones, and of the first value."""


class Vocabulary:
    """Values with a row each: 0 is unknown, 1 missing, then values by falling frequency.

    Values are those of `recsys.columns.canonical`, which defines what is missing and when two
    values are equal. Strings are recognized by a 64-bit hash of them.

    Args:
        values: (V,) distinct values in the order of their rows, Int64 or String.
        counts: (V,) how often each was seen in training.

    Raises:
        ValueError: Values repeat, are null or of another type, or counts are not as many.
    """

    def __init__(self, values: pl.Series, counts: NDArray[np.int64]) -> None:
        if values.dtype not in (pl.Int64, pl.String):
            raise ValueError(f"values must be Int64 or String, got {values.dtype}")
        if values.null_count() or len(counts) != len(values):
            raise ValueError(
                f"{len(values)} values, {values.null_count()} of them null, and {len(counts)} "
                "counts do not make a vocabulary"
            )
        self.values, self.counts = values, np.asarray(counts, np.int64)
        self.kind: Kind = "string" if values.dtype == pl.String else "integer"
        if values.n_unique() < len(values):
            twice = values.filter(values.is_duplicated())[0]
            raise ValueError(f"a vocabulary has the value {twice!r} twice")

    @classmethod
    def fit(cls, column: pl.Series, min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of the rows of a column.

        Args:
            column: (N,) integers, whole floats, booleans, strings or categories.
            min_count: Values that occur less often are left out, and so unknown.

        Raises:
            GatesError: The type is none of these; a float has a fraction.
        """
        kind = kind_of(column.name, column.dtype) or "integer"
        return cls.of_counts(count_values(column, kind), min_count)

    @classmethod
    def of_counts(cls, counts: pl.DataFrame, min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of counted values.

        Args:
            counts: Columns ``value`` and ``count``, as `count_values` returns.
            min_count: Values with smaller counts are left out.
        """
        check_at_least(1, min_count=min_count)
        kept = _by_frequency(counts.filter(pl.col("count") >= min_count))
        return cls(kept["value"], kept["count"].to_numpy())

    def __len__(self) -> int:
        """Return the number of rows, those for unknown and missing included."""
        return FIRST + len(self.values)

    def lookup(self, column: pl.Series) -> Rows:
        """Return the row of each value of a column (N,), int64."""
        keys, missing = keys_of(canonical(column, self.kind))
        return self.rows_of_keys(keys, missing)

    def rows_of_keys(self, keys: Rows, missing: NDArray[np.bool_]) -> Rows:
        """Return the row of each key (N,), int64, see `recsys.columns.canonical.keys_of`."""
        rows = self._index.find(keys)
        rows[missing] = MISSING
        return rows

    @cached_property
    def _index(self) -> RowIndex:
        keys, _ = keys_of(self.values)
        return RowIndex(keys, np.arange(FIRST, len(self)))

    def grow(self, column: pl.Series, min_count: int = 1) -> Vocabulary:
        """Return the vocabulary with further values appended; every old value keeps its row.

        Args:
            column: (N,) the values of new rows.
            min_count: New values that occur less often in these rows stay unknown.
        """
        return self.grow_by_counts(count_values(column, self.kind), min_count)

    def grow_by_counts(self, counts: pl.DataFrame, min_count: int = 1) -> Vocabulary:
        """Return what `grow` does, of counted values of the same kind."""
        check_at_least(1, min_count=min_count)
        rows = self.lookup(counts["value"])
        old, new_counts = rows >= FIRST, counts["count"].to_numpy()
        added = self.counts.copy()
        np.add.at(added, rows[old] - FIRST, new_counts[old])
        new = _by_frequency(counts.filter(pl.Series(~old & (new_counts >= min_count))))
        values = pl.concat([self.values, new["value"].rename(self.values.name)])
        return Vocabulary(values, np.concatenate([added, new["count"].to_numpy()]))

    def save(self, path: Path) -> Path:
        """Write values and counts as Parquet; equal vocabularies make equal files."""
        table = pl.DataFrame({"value": self.values, "count": pl.Series(self.counts)})
        with replacing(path) as temporary:
            table.write_parquet(temporary, compression="zstd")
        return path

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Return the vocabulary that `save` wrote.

        Raises:
            GatesError: The file is absent or holds something else.
        """
        try:
            table = pl.read_parquet(path, columns=["value", "count"])
            return cls(table["value"], table["count"].cast(pl.Int64).to_numpy())
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise GatesError(
                f"{path} is no vocabulary: {str(error).partition(chr(10))[0]}; fit the transform "
                "again or copy the whole folder"
            ) from error


@dataclass(frozen=True)
class HashedValues:
    """Rows of a table without vocabulary: 1 is missing, from 2 on the bucket of the hash.

    Row 0 is for text without a number where training had integers.

    Attributes:
        kind: Of the column, see `recsys.columns.canonical`.
        buckets: Rows for values.
    """

    kind: Kind
    buckets: int

    def __len__(self) -> int:
        """Return the number of rows, those for unknown and missing included."""
        return FIRST + self.buckets

    def lookup(self, column: pl.Series) -> Rows:
        """Return the row of each value of a column (N,), int64."""
        return self.rows_of_keys(*keys_of(canonical(column, self.kind)))

    def rows_of_keys(self, keys: Rows, missing: NDArray[np.bool_]) -> Rows:
        """Return the row of each key (N,), int64, see `recsys.columns.canonical.keys_of`."""
        rows = FIRST + bucket(hash_integers(keys), self.buckets)
        rows[missing] = MISSING
        if self.kind == "integer":
            rows[keys == UNREADABLE] = UNKNOWN
        return rows


def count_values(column: pl.Series, kind: Kind) -> pl.DataFrame:
    """Return how often each value occurs that is not missing.

    Args:
        column: (N,) integers, floats, booleans, strings or categories.
        kind: In what form values are compared.

    Returns:
        Columns ``value`` and ``count``, in no order.

    Raises:
        RowError: A number has a fraction, or exceeds 2^63 - 1.
    """
    values = canonical(column, kind)
    kept = values.filter(values >= 0 if kind == "integer" else values != "")
    if kind == "integer" and column.dtype.is_numeric() and kept.max() == UNREADABLE:
        row = int(values.arg_max() or 0)
        raise RowError(
            column.name,
            row,
            f"{column[row]} is no whole number below 2^63, as a sparse feature needs: make it a "
            "dense one, or cast the column to strings",
        )
    counts = kept.rename("value").value_counts(name="count")
    counts = counts.with_columns(pl.col("count").cast(pl.Int64))
    return counts.filter(pl.col("value") != UNREADABLE) if kind == "integer" else counts


def _by_frequency(counts: pl.DataFrame) -> pl.DataFrame:
    return counts.sort("count", "value", descending=[True, False])
