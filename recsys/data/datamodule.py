"""A data set in memory, for training, validation and test."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from harness.files import Data
from recsys.batch import Batch
from recsys.data.loader import EvaluationLoader, Order, PackedRows, TrainingLoader
from recsys.data.tables import (
    PARTS,
    Part,
    RankingTables,
    StreamSource,
    TableSource,
    refuse_seen_rows,
    table_digest,
)
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform


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
