"""A data set in memory, and batches of it in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import GatesError, check_at_least, check_option
from harness.files import Data
from recsys.columns.hashing import bucket, hash_integers
from recsys.data.doubts import of_rows
from recsys.data.leaks import find_leaks
from recsys.data.tables import (
    PARTS,
    Part,
    RankingTables,
    StreamSource,
    TableSource,
    refuse_seen_rows,
    table_digest,
)
from recsys.inputs import Batch
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform

CHUNK = 2**20  # rows that are encoded before they are packed
LARGEST = 2**31
MOST_ROWS = 200_000  # that are searched for leaks


class PackedRows:
    """Rows of a table, encoded once: table rows as int32, labels as one byte each.

    Args:
        batch: All rows.
        narrow: Store table rows as int32; they must be below 2^31.
    """

    def __init__(self, batch: Batch, *, narrow: bool = True) -> None:
        kind = torch.int32 if narrow else torch.int64
        self._stored = batch.replace(
            sparse=batch.sparse.to(kind),
            sequences=tuple(sequence.to(kind) for sequence in batch.sequences),
            labels=batch.labels.to(torch.uint8),
        )

    @classmethod
    def of(
        cls, table: pl.DataFrame, transform: FeatureTransform, *, labels: bool = True
    ) -> PackedRows:
        """Return the encoded rows of a table, see `FeatureTransform.batch`.

        Raises:
            GatesError: A column is missing or has values that cannot be read.
        """
        narrow = max(transform.sizes.values(), default=0) < LARGEST
        starts = range(0, max(len(table), 1), CHUNK)
        chunks = (table[start : start + CHUNK] for start in starts)
        packed = [
            cls(transform.batch(c, labels=labels, first_row=n), narrow=narrow)
            for n, c in zip(starts, chunks, strict=True)
        ]
        if len(packed) > 1:
            packed[0]._stored = Batch.cat([part._stored for part in packed])
        return packed[0]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._stored)

    @property
    def user(self) -> Tensor:
        """Number of the user of each row (N,), int64."""
        return self._stored.user

    @property
    def counts(self) -> bool:
        """Whether any row of weight above 0 counts for at least one task."""
        return bool(self._stored.mask[self._stored.weight > 0].any())

    @property
    def bytes(self) -> int:
        """Bytes of all columns."""
        columns = [*self._stored.plain(), *self._stored.sequences]
        return sum(column.numel() * column.element_size() for column in columns)

    def take(self, rows: Tensor | slice) -> Batch:
        """Return a batch of M of the rows, in the order given: numbers (M,) or a slice."""
        stored = self._stored.take(rows)
        return stored.replace(
            sparse=stored.sparse.long(),
            sequences=tuple(sequence.long() for sequence in stored.sequences),
            labels=stored.labels.float(),
        )


Order = Literal["shuffled", "given"]

FEWEST = 2  # rows of a training batch: a batch of one has no variance to normalize by


class TrainingLoader:
    """Batches of equal size; the rows that remain at the end of an epoch are left out.

    Args:
        rows: What is trained on.
        batch_size: Rows of a step over all ranks; all rows where there are fewer.
        order: ``shuffled`` in every epoch, or as ``given``.
        seed: Of the order.
        rank: This rank.
        world: Ranks.

    Attributes:
        position: Batch that comes next in the pass that runs, or ran last.

    Raises:
        GatesError: A batch has fewer than two rows on a rank, or is not split evenly by the ranks.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        *,
        order: Order = "shuffled",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_at_least(1, batch_size=batch_size, world=world)
        check_option("order", order, ("shuffled", "given"))
        self.rows, self.order, self.seed = rows, order, seed
        self.rank, self.world = rank, world
        self.batch_size = min(batch_size, len(rows) - len(rows) % world)
        if self.batch_size % world:
            raise GatesError(
                f"batch_size {batch_size} cannot be split evenly by {world} processes: choose a "
                f"multiple of {world}"
            )
        if self.batch_size < FEWEST * world:
            raise GatesError(
                f"a training batch has {self.batch_size} rows for {world} processes, but batch "
                f"normalization needs {FEWEST} or more on each: raise batch_size or give more "
                f"training rows than {len(rows)}"
            )
        self.epoch = self.position = self._start = 0

    @property
    def sampler(self) -> TrainingLoader:
        """The object that Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return len(self.rows) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = self._ordered()
        self.position, self._start = self._start, 0
        for number in range(self.position, len(self)):
            self.position = number + 1
            first, last = number * self.batch_size, (number + 1) * self.batch_size
            if order is None:
                yield self.rows.take(slice(first + self.rank, last, self.world))
            else:
                yield self.rows.take(order[first + self.rank : last : self.world])

    def _ordered(self) -> Tensor | None:
        if self.order == "given":
            return None
        generator = np.random.default_rng((self.seed, self.epoch))
        return torch.from_numpy(generator.permutation(len(self.rows)))

    def state_dict(self) -> dict[str, int]:
        """Return the batch that comes next, and its epoch."""
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the batch of ``state``, without reading those before it."""
        self.epoch = state["epoch"]
        self.position = self._start = state["position"] % len(self)


class EvaluationLoader:
    """All rows once, in order, those of a user on one rank; equally many batches on every rank.

    Args:
        rows: What is evaluated.
        batch_size: Most rows of a batch on a rank.
        rank: This rank.
        world: Ranks.

    Attributes:
        indices: (M,) the rows of this rank, ascending.
    """

    def __init__(self, rows: PackedRows, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        check_at_least(1, batch_size=batch_size, world=world)
        self.rows = rows
        owner = owners_of(rows.user.numpy(), world)
        self.indices = np.flatnonzero(owner == rank)
        most = int(np.bincount(owner, minlength=world).max()) if len(rows) else 0
        self._parts = np.array_split(self.indices, -(-most // batch_size)) if most else []
        self._whole = world == 1

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts:
            if self._whole:
                yield self.rows.take(slice(int(part[0]), int(part[-1]) + 1))
            else:
                yield self.rows.take(torch.from_numpy(part))


def owners_of(users: NDArray[np.int64], world: int) -> NDArray[np.int64]:
    """Return the rank that evaluates each row (N,): rows of a user share one."""
    if world == 1:
        return np.zeros(len(users), np.int64)
    return bucket(hash_integers(users), world)


class PartsDataModule(L.LightningDataModule):
    """A data module whose validation and test rows are those of parts."""

    evaluation_loader: Callable[[Part], Any]

    def val_dataloader(self) -> Any:
        """Return the validation rows of this rank."""
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> Any:
        """Return the test rows of this rank."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> Any:
        """Return the test rows of this rank."""
        return self.evaluation_loader("test")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class TableDataModule(PartsDataModule):
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
        return (*self.tables.notes, *self.doubts)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What makes results on these rows doubtful."""
        some = self.tables.train[:: -(-len(self.tables.train) // MOST_ROWS) or 1]
        leaks = map(str, find_leaks(some, self.tables.schema))
        return (*of_rows(self.tables), *self._seen, *leaks)

    def table(self, part: Part) -> pl.DataFrame:
        """Return the raw rows of a part, in the order of `rows`."""
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
        """Return the fitted state of the transform, for the checkpoint."""
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
