"""The data module of logs that are larger than memory."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from core_gates.errors import GatesError, check_at_least
from harness.files import Data, short_digest
from recsys.schema import FeatureSchema
from video_multitask.stream.loader import EvaluationStream, StreamLoader
from video_multitask.stream.periods import Periods
from video_multitask.stream.plan import WINDOW, Order, StreamPlan
from video_multitask.stream.reader import columns_of
from video_multitask.stream.shards import Shards

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class ParquetStream(L.LightningDataModule):
    """Batches of Parquet shards, in bounded memory, that resume at the exact next one.

    Row groups are distributed over ranks and workers, rows shuffled within a window; see
    :class:`~video_multitask.stream.plan.StreamPlan`. Vocabularies and scales are learned from the
    training days alone, in one pass, unless a transform is given.

    Args:
        shards: The whole log, labelled and joined.
        periods: Which days train, validate and test.
        schema: Features and tasks; not needed with a transform.
        batch_size: Training rows of a step over all ranks.
        window: Rows that are shuffled together.
        order: Row groups in ``time`` order, or ``shuffled`` in each epoch.
        seed: Of the order.
        workers: Reading processes of each rank; 0 reads in the training process.
        transform: A fitted ``FeatureTransform``, such as that of a network that is trained further.

    Raises:
        GatesError: A period has no rows.
        ValueError: A size is below 1, or there is neither schema nor transform.
    """

    def __init__(
        self,
        shards: Shards,
        periods: Periods,
        schema: FeatureSchema | None = None,
        *,
        batch_size: int = 1024,
        window: int = WINDOW,
        order: Order = "time",
        seed: int = 0,
        workers: int = 0,
        transform: Any = None,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, workers=workers)
        if schema is None and transform is None:
            raise ValueError("the stream needs a schema, or a fitted transform, which has one")
        self.parts = {part: period.of(shards) for part, period in zip(PARTS, periods, strict=True)}
        self.schema: FeatureSchema = transform.schema if schema is None else schema
        self.batch_size, self.window, self.order = batch_size, window, order
        self.seed, self.workers = seed, workers
        self._transform = transform

    @property
    def transform(self) -> Any:
        """The transform, fitted on the training days once."""
        if self._transform is None:
            from recsys.transform import FeatureTransform

            made = FeatureTransform(self.schema)
            self._transform = made.fit_batches(self.parts["train"].parts(columns_of(self.schema)))
        return self._transform

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Fit the transform, if it is not given."""
        self.transform  # noqa: B018

    def digest(self) -> list[Data]:
        """Describe the rows of each part by the hashes of their files."""
        return [
            Data(shards.folder.name, part, _digest(shards), shards.rows, "rows")
            for part, shards in self.parts.items()
        ]

    def training_objects(self) -> list[str]:
        """Return a short hash of each file of the training days."""
        return [file.sha256[:12] for file in self.parts["train"].files]

    def train_dataloader(self) -> StreamLoader:
        """Return the training batches of this rank.

        Raises:
            GatesError: The batch size is not a multiple of the ranks, or there are too few rows.
        """
        rank, world = self._rank()
        if self.batch_size % world:
            raise GatesError(
                f"batch_size {self.batch_size} cannot be split evenly by {world} processes: choose "
                f"a multiple of {world}"
            )
        shards = self.parts["train"]
        plan = StreamPlan(
            tuple(shards.groups),
            world * max(1, self.workers),
            self.batch_size // world,
            self.window,
            self.order,
            self.seed,
        )
        return StreamLoader(
            shards, self.transform, plan, rank=rank, world=world, workers=self.workers
        )

    def evaluation_loader(self, part: Part) -> EvaluationStream:
        """Return all rows of a part, those of this rank."""
        rank, world = self._rank()
        return EvaluationStream(
            self.parts[part], self.transform, rank=rank, world=world, workers=self.workers
        )

    def val_dataloader(self) -> EvaluationStream:
        """Return the validation rows of this rank."""
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> EvaluationStream:
        """Return the test rows of this rank."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationStream:
        """Return the test rows of this rank."""
        return self.evaluation_loader("test")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _digest(shards: Shards) -> str:
    return short_digest({file.name: file.sha256 for file in shards.files}, 64)
