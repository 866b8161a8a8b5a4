"""What a ranker is trained, validated and tested on: tables, their digest, and rows seen twice."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from recsys.columns.hashing import hash_integers, hash_strings
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
    found = hashlib.sha256()
    found.update(
        repr([len(table), *zip(table.columns, map(str, table.dtypes), strict=True)]).encode()
    )
    for start in range(0, len(table), BLOCK):
        for column in table[start : start + BLOCK]:
            _add(found, column)
    return found.hexdigest()


def _add(found: hashlib._Hash, column: pl.Series) -> None:
    found.update(np.packbits(column.is_null().to_numpy()).tobytes())
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        found.update(column.list.len().fill_null(0).cast(pl.Int64).to_numpy().tobytes())
        _add(found, column.filter(column.list.len() > 0).explode())
    elif column.dtype.is_float():
        found.update(column.cast(pl.Float64).fill_null(0.0).to_numpy().tobytes())
    elif column.dtype.is_integer() or column.dtype == pl.Boolean or column.dtype.is_temporal():
        bits = column.to_physical()
        if bits.dtype == pl.UInt64:
            bits = bits.reinterpret(signed=True)
        whole = bits.cast(pl.Int64, strict=False).fill_null(0).to_numpy()
        found.update(hash_integers(whole).tobytes())
    else:
        found.update(hash_strings(column.cast(pl.String)).tobytes())


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


def _common(found: list[pl.DataType]) -> pl.DataType:
    """Return a type that holds a column of all parts."""
    if len(set(found)) == 1 and not isinstance(found[0], pl.Categorical | pl.Enum | pl.Array):
        return found[0]
    inner = [kind.inner if isinstance(kind, pl.List | pl.Array) else kind for kind in found]
    plain = pl.Float64() if all(kind.is_numeric() for kind in inner) else pl.String()
    return pl.List(plain) if isinstance(found[0], pl.List | pl.Array) else plain
