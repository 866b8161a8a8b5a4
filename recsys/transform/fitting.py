"""What is learned from training rows, one table after another: values, scales, histories."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.canonical import (
    EVENTS,
    UNREADABLE,
    Kind,
    RowError,
    canonical,
    check_times,
    is_text,
    kind_of,
    numbers_of,
    split_events,
    without_words,
)
from recsys.columns.hashing import QuantileSketch
from recsys.schema import VALUES, Dense, FeatureSchema, History, Sparse
from recsys.vocabulary import FIRST, MISSING, HashedValues, Vocabulary, count_values

Floats = NDArray[np.float64]

LARGEST = 1e18  # of a scaled number: its square is still a finite float32
SMALLEST = 1e-300  # standard deviation whose inverse is finite
SHIFT = 3.0  # quartile ranges of the training rows, beyond which a median has shifted
FEWEST = 20  # numbers that have a median


class Scaler(NamedTuple):
    """How numbers of a column are scaled: (f(x) − center) · factor.

    Attributes:
        center: Mean of f(x) over the training rows; 0 for raw numbers.
        factor: 1 / standard deviation of f(x); 1 for raw numbers and for constant columns.
        logarithmic: f(x) = sign(x) log(1 + |x|) instead of x.
    """

    center: float
    factor: float
    logarithmic: bool

    def scale(self, numbers: Floats, out: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Write scaled numbers (N,) to ``out``, 0 where missing, and return where that is."""
        missing = np.isnan(numbers)
        scaled = signed_log(numbers) if self.logarithmic else numbers.copy()
        with np.errstate(over="ignore"):
            scaled -= self.center
            scaled *= self.factor
        np.clip(scaled, -LARGEST, LARGEST, out=scaled)
        if missing.any():
            scaled[missing] = 0.0
        out[:] = scaled
        return missing


class Buckets(NamedTuple):
    """Which quantile a number lies in: the rows of a small embedding table.

    Attributes:
        edges: (Q - 1,) ascending; a value that equals an edge lies above it.
        buckets: Rows Q for quantiles, some of them unused where edges coincide.
    """

    edges: Floats
    buckets: int

    @property
    def num_rows(self) -> int:
        """Rows of the table, those for unknown, never used, and missing included."""
        return FIRST + self.buckets

    def rows(self, numbers: Floats) -> NDArray[np.int64]:
        """Return the row of each number (N,): 1 where missing, else 2 + its quantile."""
        bins = FIRST + np.searchsorted(self.edges, numbers, side="right")
        bins[np.isnan(numbers)] = MISSING
        return bins


def places_of(numbers: Floats, known: Sequence[float]) -> NDArray[np.int64]:
    """Return how many numbers (N,) are known, below, above, far below and far above those known.

    Far is more than three quartile ranges from the median.

    Args:
        numbers: NaN where missing.
        known: Smallest, quartiles and largest of the training rows.
    """
    low, first, median, third, high = known
    far = SHIFT * (third - first)
    ends = numbers < low, numbers > high
    further = numbers < median - far, numbers > median + far
    return np.array(
        [np.count_nonzero(is_part) for is_part in (~np.isnan(numbers), *ends, *further)]
    )


def has_shifted(counts: NDArray[np.int64]) -> bool:
    """Return whether most numbers are far from the training median; False for few numbers."""
    return bool(counts[0] >= FEWEST and 2 * counts[3:].max() > counts[0])


def signed_log(numbers: Floats) -> Floats:
    """Return sign(x) log(1 + |x|) of each number."""
    magnitudes = np.log1p(np.abs(numbers))
    return np.copysign(magnitudes, numbers, out=magnitudes)


@dataclass
class Moments:
    """Mean and variance of numbers that pass by once (Chan, Golub and LeVeque, 1983).

    Attributes:
        count: Numbers.
        mean: Of them.
        squares: Sum of squared distances from the mean.
        low: Smallest number.
        high: Largest number.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, numbers: Floats) -> None:
        """Add finite numbers (N,)."""
        if not len(numbers):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(numbers.mean())
            squares = float(np.square(numbers - mean).sum())
            count = self.count + len(numbers)
            apart = mean - self.mean
            self.squares += squares + apart * apart * (self.count * len(numbers) / count)
            self.mean += apart * len(numbers) / count
        self.count = count
        self.low = min(self.low, float(numbers.min()))
        self.high = max(self.high, float(numbers.max()))

    @property
    def deviation(self) -> float:
        """Standard deviation, exactly 0 where all numbers are equal."""
        return math.sqrt(self.squares / self.count) if self.high > self.low else 0.0


@dataclass
class DenseStatistics:
    """What is collected of one dense column while the training rows pass by.

    Attributes:
        feature: The column.
        moments: Of its numbers, or of their logarithms.
        sketch: Of its numbers, for buckets.
        spread: Of its numbers, for quartiles.
        low: Smallest number.
        high: Largest number.
    """

    feature: Dense
    moments: Moments = field(default_factory=Moments)
    sketch: QuantileSketch = field(default_factory=QuantileSketch)
    spread: QuantileSketch = field(default_factory=lambda: QuantileSketch(2**12))
    low: float = math.inf
    high: float = -math.inf

    def add(self, numbers: Floats) -> None:
        """Add numbers (N,), NaN where missing."""
        finite = numbers[~np.isnan(numbers)]
        self.low = min(self.low, float(finite.min(initial=math.inf)))
        self.high = max(self.high, float(finite.max(initial=-math.inf)))
        self.spread.add(finite)
        if self.feature.scaling == "buckets":
            self.sketch.add(finite)
        elif self.feature.scaling != "none":
            self.moments.add(signed_log(finite) if self._logarithmic else finite)

    @property
    def _logarithmic(self) -> bool:
        return self.feature.scaling == "log_standardize"

    def finish(self) -> Scaler | Buckets:
        """Return how the column is scaled.

        Raises:
            GatesError: The variance exceeds the range of floating-point numbers.
        """
        if self.feature.scaling == "buckets":
            count = self.feature.buckets
            edges = self.sketch.quantiles(np.arange(1, count) / count)
            return Buckets(np.unique(edges[~np.isnan(edges)]), count)
        if self.feature.scaling == "none":
            return Scaler(0.0, 1.0, logarithmic=False)
        deviation, center = self.moments.deviation, self.moments.mean
        if not math.isfinite(deviation) or not math.isfinite(center):
            raise GatesError(
                f"column {self.feature.name!r} reaches from {self.moments.low:.3g} to "
                f"{self.moments.high:.3g}, too wide to be standardized: use scaling "
                "log_standardize"
            )
        if deviation < SMALLEST:
            return Scaler(self.moments.low if self.moments.count else 0.0, 1.0, self._logarithmic)
        return Scaler(center, 1.0 / deviation, self._logarithmic)


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
        ranges: Smallest, quartiles and largest of each dense column with numbers; those of the
            first rows if more were learned from later.
    """

    rows: int = 0
    first: Time | None = None
    last: Time | None = None
    ranges: Mapping[str, Sequence[float]] = {}

    def joined(self, other: Fitted) -> Fitted:
        """Return both together.

        Raises:
            GatesError: Their times are of different types.
        """
        try:
            first = min(_known(self.first, other.first), default=None)
            last = max(_known(self.last, other.last), default=None)
        except TypeError as error:
            raise GatesError(
                f"the time column holds {other.first!r} after {self.first!r}: write all tables "
                "with one type of time"
            ) from error
        return self._replace(rows=self.rows + other.rows, first=first, last=last)

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
                part_values = VALUES.get(feature.part)
                column = table[feature.name] if part_values is None else pl.Series(part_values)
                self._counts[feature.table_name].add(without_words(column, self.missing))
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

    def ranges(self) -> dict[str, list[float]]:
        """Return ends and quartiles of every dense column that has numbers."""
        return {
            name: [
                column_range.low,
                *column_range.spread.quantiles([0.25, 0.5, 0.75]).tolist(),
                column_range.high,
            ]
            for name, column_range in self._dense.items()
            if column_range.low <= column_range.high
        }

    def grown(self, old: Mapping[str, Table]) -> dict[str, Table]:
        """Return tables with the values of these rows appended, old rows as they are."""
        tables: dict[str, Table] = dict(old)
        for feature in self.schema.sparse:
            table, counts = old[feature.table_name], self._counts[feature.table_name]
            if isinstance(table, Vocabulary):
                total = _as_kind(counts.total(), table.kind)
                tables[feature.table_name] = table.grow_by_counts(total, feature.min_count)
        return tables

    @staticmethod
    def _table(feature: Sparse, counts: ValueCounts) -> Table:
        if feature.storage == "hash":
            return HashedValues(counts.kind, feature.buckets)
        return Vocabulary.of_counts(counts.total(), feature.min_count)


def _as_kind(counts: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Return counted values in the form of a vocabulary; those that have none are left out."""
    casted = counts.with_columns(canonical(counts["value"], kind))
    if kind == "integer":
        casted = casted.filter((pl.col("value") >= 0) & (pl.col("value") != UNREADABLE))
    return _summed([casted])


def _summed(parts: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(parts).group_by("value").agg(pl.col("count").sum())


def _plain(value: object) -> Time | None:
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    return value if isinstance(value, int | float | str) else None


def _known(*times: Time | None) -> list[Any]:
    return [column for column in times if column is not None]


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
