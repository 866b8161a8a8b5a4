"""What a ranker is trained, validated and tested on, as a data set in memory."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple, Protocol, cast

import lightning as L
import numpy as np
import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from harness.files import Data
from recsys.batch import Batch
from recsys.columns.hashing import hash_integers, hash_strings
from recsys.data.loader import EvaluationLoader, Order, PackedRows, TrainingLoader
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform

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


class TableDataModule(L.LightningDataModule):
    """Batches of a data set whose encoded rows fit into memory.

    Vocabularies and scales are learned from the training rows alone, unless a transform is given.

    Args:
        source: The tables, or what reads them.
        batch_size: Training rows of a step over all ranks.
        eval_batch_size: Rows of a batch on a rank in validation and test.
        order: Training rows ``shuffled`` in every epoch, or as ``given``, such as by time.
        seed: Of the order.
        transform: A fitted transform, such as that of a network that is trained further.

    Raises:
        ValueError: A size is below 1, or the order is unknown.
    """

    def __init__(
        self,
        source: RankingTables | TableSource,
        batch_size: int = 1024,
        eval_batch_size: int = 8192,
        order: Order = "shuffled",
        seed: int = 0,
        transform: FeatureTransform | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_option("order", order, ("shuffled", "given"))
        self.source, self.order, self.seed = source, order, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self._transform = transform
        self._tables: RankingTables | None = None
        self._seen: tuple[str, ...] = ()
        self._packed: dict[Part, PackedRows] = {}

    @property
    def tables(self) -> RankingTables:
        """The tables, read once.

        Raises:
            GatesError: They cannot be read, there are no training rows, or most test rows are
                training rows.
        """
        if self._tables is None:
            source = self.source
            self._tables = source if isinstance(source, RankingTables) else source.read()
            self._seen = refuse_seen_rows(self._tables)
        return self._tables

    @property
    def transform(self) -> FeatureTransform:
        """The transform, fitted on the training rows once."""
        if self._transform is None:
            tables = self.tables
            self._transform = FeatureTransform(tables.schema, tables.missing).fit(tables.train)
        return self._transform

    @property
    def schema(self) -> FeatureSchema:
        """What the columns are."""
        return self.transform.schema

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about the data."""
        return (*self.tables.notes, *self._seen)

    def table(self, part: Part) -> pl.DataFrame:
        """Return the raw rows of a part, in the order of :meth:`rows`."""
        return self.tables.part(part)

    def rows(self, part: Part) -> PackedRows:
        """Return the encoded rows of a part.

        Raises:
            GatesError: The part is empty, none of its rows counts, or a value cannot be read.
        """
        if part not in self._packed:
            table = self.table(part)
            if not len(table):
                raise GatesError(f"the {part} part of {self.tables.name} is empty: give it rows")
            try:
                self._packed[part] = PackedRows.of(table, self.transform)
            except GatesError as error:
                raise GatesError(f"{self.tables.name}, {part}: {error}") from error
            self._require_counted(part)
        return self._packed[part]

    def _require_counted(self, part: Part) -> None:
        """Refuse rows that teach or tell nothing, with which every loss would be 0."""
        if self._packed[part].counts:
            return
        del self._packed[part]
        raise GatesError(
            f"no row of the {part} part of {self.tables.name} counts for any task: all weights or "
            "masks are 0; give it rows with a weight"
        )

    def batch(self, part: Part) -> Batch:
        """Return all rows of a part as one batch."""
        return self.rows(part).take(slice(None))

    def setup(self, stage: str) -> None:
        """Read the tables, fit the transform and encode what the stage needs."""
        wanted: dict[str, tuple[Part, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        for part in wanted.get(stage, PARTS):
            self.rows(part)

    def state_dict(self) -> dict[str, Any]:
        """Return what the transform has learned from, for the checkpoint."""
        return {"fitted": self.transform.fitted._asdict(), "trained_on": self.training_objects()}

    def digest(self) -> list[Data]:
        """Describe the rows of every part by their content."""
        return [
            Data(self.tables.name, part, table_digest(table), len(table), "rows")
            for part in PARTS
            if len(table := self.table(part))
        ]

    def training_objects(self) -> list[str]:
        """Return one short hash of all training rows: the same rows as test rows have the same."""
        return [table_digest(self.table("train"))[:12]]

    def train_dataloader(self) -> TrainingLoader:
        """Return the training batches of this rank."""
        rank, world = self._rank()
        return TrainingLoader(
            self.rows("train"),
            self.batch_size,
            order=self.order,
            seed=self.seed,
            rank=rank,
            world=world,
        )

    def evaluation_loader(self, part: Part) -> EvaluationLoader:
        """Return all rows of a part, those of this rank, in order."""
        rank, world = self._rank()
        return EvaluationLoader(self.rows(part), self.eval_batch_size, rank=rank, world=world)

    def val_dataloader(self) -> EvaluationLoader:
        """Return the validation rows of this rank."""
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> EvaluationLoader:
        """Return the test rows of this rank."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """Return the test rows of this rank."""
        return self.evaluation_loader("test")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def data_module(
    source: RankingTables | TableSource | StreamSource,
    batch_size: int = 1024,
    eval_batch_size: int = 8192,
    order: Order = "shuffled",
    seed: int = 0,
    transform: FeatureTransform | None = None,
) -> TableDataModule:
    """Return the data module of a source: in memory, or, if the source can, as a stream.

    Args:
        source: The tables, or what reads them.
        batch_size: Training rows of a step over all ranks.
        eval_batch_size: Rows of a batch on a rank in validation and test, of tables in memory.
        order: Training rows ``shuffled`` in every epoch, or as ``given``, such as by time.
        seed: Of the order.
        transform: A fitted transform, such as that of a network that is trained further.

    Raises:
        ValueError: A size is below 1, or the order is unknown.
    """
    stream = getattr(source, "stream", None)
    if stream is None:
        tables = cast(RankingTables | TableSource, source)
        return TableDataModule(tables, batch_size, eval_batch_size, order, seed, transform)
    check_option("order", order, ("shuffled", "given"))
    return cast(TableDataModule, stream(batch_size, order, seed, transform))
