"""What a ranker is trained, validated and tested on: rows by time, by users, in rolling windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import polars as pl

from core_gates.errors import GatesError, check_at_least
from recsys.columns.canonical import RowError, check_times, keys_of_ids
from recsys.columns.hashing import bucket, combine, hash_integers, hash_strings
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform

if TYPE_CHECKING:
    import lightning as L


Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class RankingTables(NamedTuple):
    """The rows of a data set in three parts, and what their columns are.

    Attributes:
        name: Of the data set.
        schema: What the columns are.
        train: Rows to train on.
        validation: Rows that choose among networks.
        test: Rows that score them.
        notes: What a reader should know: the split, what was left out and why.
        missing: Words in text that are null, here and wherever the network is used.
    """

    name: str
    schema: FeatureSchema
    train: pl.DataFrame
    validation: pl.DataFrame
    test: pl.DataFrame
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def part(self, name: Part) -> pl.DataFrame:
        """Return the rows of a part.

        Raises:
            GatesError: There is no such part.
        """
        if name not in PARTS:
            raise GatesError(f"there is no part {name!r}: choose one of {', '.join(PARTS)}")
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class TableSource(Protocol):
    """Where tables come from, such as a reader of files."""

    def read(self) -> RankingTables:
        """Return the tables.

        Raises:
            GatesError: A file is absent or cannot be read.
        """


class StreamSource(Protocol):
    """Where the rows come from that do not fit into memory."""

    def stream(
        self, batch_size: int, order: str, seed: int, transform: FeatureTransform | None
    ) -> L.LightningDataModule:
        """Return a data module that reads them batch by batch.

        It has ``schema``, ``transform``, ``notes``, ``batch``, ``table``, ``digest`` and
        ``training_objects`` like a ``TableDataModule``.

        Args:
            batch_size: Training rows of a step over all ranks.
            order: ``shuffled`` in every epoch, or as ``given``.
            seed: Of the order.
            transform: A fitted transform; its own by default.
        """


BLOCK = 2**18


def table_digest(table: pl.DataFrame) -> str:
    """Return the hexadecimal SHA-256 of names, types and values of a table, in their order.

    It is the same in every process; null, NaN, empty text and empty lists are distinguished.
    """
    digest = hashlib.sha256()
    digest.update(
        repr([len(table), *zip(table.columns, map(str, table.dtypes), strict=True)]).encode()
    )
    for start in range(0, len(table), BLOCK):
        for column in table[start : start + BLOCK]:
            _add(digest, column)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, column: pl.Series) -> None:
    digest.update(np.packbits(column.is_null().to_numpy()).tobytes())
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        digest.update(column.list.len().fill_null(0).cast(pl.Int64).to_numpy().tobytes())
        _add(digest, column.filter(column.list.len() > 0).explode())
    elif column.dtype.is_float():
        digest.update(column.cast(pl.Float64).fill_null(0.0).to_numpy().tobytes())
    elif column.dtype.is_integer() or column.dtype == pl.Boolean or column.dtype.is_temporal():
        bits = column.to_physical()
        if bits.dtype == pl.UInt64:
            bits = bits.reinterpret(signed=True)
        whole = bits.cast(pl.Int64, strict=False).fill_null(0).to_numpy()
        digest.update(hash_integers(whole).tobytes())
    else:
        digest.update(hash_strings(column.cast(pl.String)).tobytes())


MOST = 0.5  # of the test rows, from which they are refused


def refuse_seen_rows(tables: RankingTables) -> tuple[str, ...]:
    """Return notes on test rows that are training or validation rows, too.

    Rows are equal if all are that the schema names: features, labels, weights, user, item and
    time. Where few columns with few values are named, rows of any part are often equal, and
    nothing is refused.

    Raises:
        GatesError: Most test rows are training or validation rows, and training rows seldom equal
            each other.
    """
    train, validation, test = _hashes(tables)
    if not len(test) or not len(train):
        return ()
    count = int(test.is_in(pl.concat([train, validation]).unique().implode()).sum())
    if not count:
        return ()
    part, usual = count / len(test), float(train.is_duplicated().mean() or 0.0)  # type: ignore[arg-type]
    said = f"{count:,} of {len(test):,} test rows equal training or validation rows"
    if part > MOST and usual < part / 2:
        raise GatesError(
            f"{tables.name}: {said}, so scores would be those of known rows: test on other rows"
        )
    also = f", as {usual:.0%} of the training rows equal others" if usual else ""
    return (f"{said}{also}",)


def _hashes(tables: RankingTables) -> list[pl.Series]:
    """Return a hash of each row, part by part; a value has the same in all integer types."""
    schema, parts = tables.schema, (tables.train, tables.validation, tables.test)
    named = dict.fromkeys([*schema.features, *schema.labels, *schema.keys])
    names = [n for n in named if all(n in table.columns for table in parts)]
    kinds = {n: _common([table.schema[n] for table in parts]) for n in names}
    return [
        table.select(pl.col(n).cast(kind, strict=False) for n, kind in kinds.items()).hash_rows()
        for table in parts
    ]


def _common(dtypes: list[pl.DataType]) -> pl.DataType:
    """Return a type that holds a column of all parts."""
    if len(set(dtypes)) == 1 and not isinstance(dtypes[0], pl.Categorical | pl.Enum | pl.Array):
        return dtypes[0]
    inner = [kind.inner if isinstance(kind, pl.List | pl.Array) else kind for kind in dtypes]
    plain = pl.Float64() if all(kind.is_numeric() for kind in inner) else pl.String()
    return pl.List(plain) if isinstance(dtypes[0], pl.List | pl.Array) else plain


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
        key_hashes = hash_integers(np.where(missing, -1 - rows, keys), seed)
        hashes = combine(hashes, key_hashes) if number else key_hashes
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
