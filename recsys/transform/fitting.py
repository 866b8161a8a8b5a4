"""What is learned from training rows, one table after another."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl

from core_gates.errors import GatesError
from recsys.columns.canonical import UNREADABLE, Kind, canonical, kind_of
from recsys.columns.numbers import numbers_of
from recsys.columns.row_error import RowError
from recsys.columns.text import without_words
from recsys.columns.times import check_times
from recsys.schema import FeatureSchema, Sparse
from recsys.transform.scaling import Buckets, DenseStatistics, Scaler
from recsys.vocabulary import HashedValues, Vocabulary, count_values

Table = Vocabulary | HashedValues
Time = int | float | str

COMPACTED_FROM = 2**20  # counted values


class Fitted(NamedTuple):
    """Which rows a transform has learned from.

    Attributes:
        rows: Their number.
        first: Earliest value of the schema's time column, as ISO 8601 where it has dates; None
            without one.
        last: Latest value of it.
    """

    rows: int = 0
    first: Time | None = None
    last: Time | None = None

    def joined(self, other: Fitted) -> Fitted:
        """Return both together.

        Raises:
            GatesError: Their times are of different types.
        """
        try:
            first = _first_of(self.first, other.first)
            last = _last_of(self.last, other.last)
        except TypeError as error:
            raise GatesError(
                f"the time column holds {other.first!r} after {self.first!r}: write all tables "
                "with one type of time"
            ) from error
        return Fitted(self.rows + other.rows, first, last)

    @classmethod
    def of(cls, table: pl.DataFrame, time: str) -> Fitted:
        """Describe the rows of a table with, or without, the column ``time``.

        Raises:
            GatesError: Values of the column have no order.
        """
        if time not in table.columns or not len(table):
            return cls(len(table))
        check_times(table[time])
        return cls(len(table), _plain(table[time].min()), _plain(table[time].max()))


class ValueCounts:
    """How often each value of the columns of one table has occurred."""

    def __init__(self) -> None:
        self._parts: dict[Kind, list[pl.DataFrame]] = {"integer": [], "string": []}
        self._pending = 0

    def add(self, column: pl.Series) -> None:
        """Count the values of a column."""
        kind = kind_of(column.name, column.dtype)
        if kind is None:
            return
        counts = count_values(column, kind)
        self._parts[kind].append(counts)
        self._pending += len(counts)
        if self._pending > COMPACTED_FROM:
            self._parts = {k: [_summed(parts)] for k, parts in self._parts.items() if parts}
            self._parts = {"integer": [], "string": [], **self._parts}
            self._pending = 0

    @property
    def kind(self) -> Kind:
        """``string`` if a column of strings was among them."""
        return "string" if self._parts["string"] else "integer"

    def total(self) -> pl.DataFrame:
        """Return columns ``value`` and ``count``."""
        integers = self._parts["integer"]
        if self.kind == "string":
            cast = pl.col("value").cast(pl.String)
            return _summed([*self._parts["string"], *(p.with_columns(cast) for p in integers)])
        empty = pl.DataFrame(schema={"value": pl.Int64, "count": pl.Int64})
        return _summed([empty, *integers])


class Fitting:
    """Counts and statistics of all columns that a schema names.

    Args:
        schema: What the columns are.
        missing: Words in text that are null.

    Attributes:
        fitted: The rows that were added.
    """

    def __init__(self, schema: FeatureSchema, missing: Sequence[str] = ()) -> None:
        self.schema, self.missing, self.fitted = schema, missing, Fitted()
        self._counts = {feature.table_name: ValueCounts() for feature in schema.sparse}
        self._dense = {feature.name: DenseStatistics(feature) for feature in schema.dense}

    def add(self, table: pl.DataFrame) -> None:
        """Learn from further training rows.

        Raises:
            GatesError: A column is missing, or has values that cannot be read.
        """
        self.schema.check_columns(table.columns, labels=False)
        try:
            for feature in self.schema.sparse:
                column = without_words(table[feature.name], self.missing)
                self._counts[feature.table_name].add(column)
            for name, statistics in self._dense.items():
                statistics.add(numbers_of(without_words(table[name], self.missing)))
        except RowError as error:
            raise error.shifted(self.fitted.rows) from error
        self.fitted = self.fitted.joined(Fitted.of(table, self.schema.time))

    def tables(self) -> dict[str, Table]:
        """Return the vocabulary or the hashing of every table of sparse features."""
        return {
            feature.table_name: self._table(feature, self._counts[feature.table_name])
            for feature in self.schema.sparse
        }

    def scalers(self) -> dict[str, Scaler | Buckets]:
        """Return how every dense column is scaled."""
        return {name: statistics.finish() for name, statistics in self._dense.items()}

    def grown(self, old: Mapping[str, Table]) -> dict[str, Table]:
        """Return tables with the values of these rows appended, old rows as they are."""
        found: dict[str, Table] = dict(old)
        for feature in self.schema.sparse:
            table, counts = old[feature.table_name], self._counts[feature.table_name]
            if isinstance(table, Vocabulary):
                total = _as_kind(counts.total(), table.kind)
                found[feature.table_name] = table.grow_by_counts(total, feature.min_count)
        return found

    @staticmethod
    def _table(feature: Sparse, counts: ValueCounts) -> Table:
        if feature.storage == "hash":
            return HashedValues(counts.kind, feature.buckets)
        return Vocabulary.of_counts(counts.total(), feature.min_count)


def _as_kind(counts: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Return counted values in the form of a vocabulary; those that have none are left out."""
    found = counts.with_columns(canonical(counts["value"], kind))
    if kind == "integer":
        found = found.filter((pl.col("value") >= 0) & (pl.col("value") != UNREADABLE))
    return _summed([found])


def _summed(parts: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(parts).group_by("value").agg(pl.col("count").sum())


def _plain(value: object) -> Time | None:
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    return value if isinstance(value, int | float | str) else None


def _first_of(one: Time | None, other: Time | None) -> Time | None:
    known: list[Time] = [value for value in (one, other) if value is not None]
    return min(known) if known else None  # type: ignore[type-var]


def _last_of(one: Time | None, other: Time | None) -> Time | None:
    known: list[Time] = [value for value in (one, other) if value is not None]
    return max(known) if known else None  # type: ignore[type-var]
