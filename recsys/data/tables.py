"""What a ranker is trained, validated and tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import polars as pl

from core_gates.errors import GatesError
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform

if TYPE_CHECKING:  # who only reads tables does not wait for Lightning
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
