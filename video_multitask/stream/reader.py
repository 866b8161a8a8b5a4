"""Batches of one stream by their number: the n-th is read without those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import polars as pl
import torch

from core_gates.errors import GatesError
from recsys.batch import Batch
from recsys.data.splits import split_by_hash
from recsys.schema import FeatureSchema
from video_multitask.stream.plan import StreamPlan, Window, locate
from video_multitask.stream.shards import Group, Shards

if TYPE_CHECKING:
    from torch import Tensor


class Encoder(Protocol):
    """What makes batches of tables, such as ``recsys.transform.FeatureTransform``."""

    schema: FeatureSchema

    def batch(self, table: pl.DataFrame, *, labels: bool = True, first_row: int = 0) -> Batch:
        """Return the encoded rows of a table."""


def columns_of(schema: FeatureSchema) -> list[str]:
    """Return the columns of a table that a schema reads."""
    crossed = [name for cross in schema.crossed for name in cross.of]
    named = [*schema.features, *crossed, *schema.labels, *schema.keys]
    return list(dict.fromkeys(named))


def some_users(table: pl.DataFrame, user: str, fraction: float) -> pl.DataFrame:
    """Return the rows of a fraction of the users, the same ones in every table.

    Args:
        table: Rows.
        user: Column of the user.
        fraction: Of the users, about; all rows if 1.

    Raises:
        GatesError: There is no column of the user.
    """
    return table if fraction == 1 else split_by_hash(table, user, validation=0, test=fraction).test


def encode(
    shards: Shards,
    groups: Sequence[Group],
    encoder: Encoder,
    first_row: int = 0,
    *,
    users: float = 1.0,
) -> Batch:
    """Read row groups and encode them.

    Args:
        shards: Where rows are read from.
        groups: Row groups.
        encoder: Makes the batch.
        first_row: Rows before these.
        users: Fraction of the users whose rows are kept.

    Raises:
        GatesError: A file is damaged, or a value cannot be read.
    """
    names = columns_of(encoder.schema)
    table = pl.concat([shards.read(group, names) for group in groups])
    table = some_users(table, encoder.schema.user, users)
    try:
        return encoder.batch(table, first_row=first_row)
    except GatesError as error:
        place = f"{shards.folder / groups[0].file}, row group {groups[0].number}"
        raise GatesError(f"{place}: {error}") from error


class StreamReader:
    """Random access to the batches of a stream in an epoch; two windows are kept in memory.

    Args:
        shards: Where rows are read from.
        encoder: Makes batches of them.
        plan: What belongs to which stream.
        stream: Number of the stream.
        epoch: Number of the epoch.
    """

    def __init__(
        self, shards: Shards, encoder: Encoder, plan: StreamPlan, stream: int, epoch: int
    ) -> None:
        self.shards, self.encoder, self.plan = shards, encoder, plan
        self.stream, self.epoch = stream, epoch
        self.windows = plan.windows(stream, epoch)
        self._kept: dict[int, tuple[Batch, Tensor]] = {}

    def batch(self, number: int) -> Batch:
        """Return a batch of the stream, which may end one window and begin the next.

        Raises:
            GatesError: A file is damaged, or a value cannot be read.
        """
        first = number * self.plan.batch_size
        end = first + self.plan.batch_size
        parts = []
        for k in range(locate(self.windows, first), locate(self.windows, end - 1) + 1):
            window = self.windows[k]
            rows, order = self._window(window)
            inside = slice(max(0, first - window.first), end - window.first)
            parts.append(rows.take(order[inside]))
        return parts[0] if len(parts) == 1 else Batch.cat(parts)

    def _window(self, window: Window) -> tuple[Batch, Tensor]:
        if window.number not in self._kept:
            for old in [number for number in self._kept if number != window.number - 1]:
                del self._kept[old]
            rows = encode(self.shards, window.groups, self.encoder, window.first)
            order = self.plan.permutation(self.stream, self.epoch, window)
            self._kept[window.number] = rows, torch.from_numpy(order)
        return self._kept[window.number]
