"""Encoded rows in as little memory as they need, and batches of them."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from recsys.batch import Batch
from recsys.transform import FeatureTransform

CHUNK = 2**20  # rows that are encoded before they are packed
LARGEST = 2**31


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
        """Return the encoded rows of a table, see :meth:`FeatureTransform.batch`.

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
            packed[0]._stored = Batch.cat([one._stored for one in packed])
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
        """Whether a row has a weight above 0 and counts for a task."""
        return bool(self._stored.mask[self._stored.weight > 0].any())

    @property
    def bytes(self) -> int:
        """Bytes of all columns."""
        columns = [*self._stored.plain(), *self._stored.sequences]
        return sum(column.numel() * column.element_size() for column in columns)

    def take(self, rows: Tensor | slice) -> Batch:
        """Return a batch of M of the rows, in the order given: numbers (M,) or a slice."""
        found = self._stored.take(rows)
        return found.replace(
            sparse=found.sparse.long(),
            sequences=tuple(sequence.long() for sequence in found.sequences),
            labels=found.labels.float(),
        )
