"""A loader whose order depends on seed and epoch, and whose position a checkpoint restores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from endoscopy.data.frames.dataset import Batch, BatchDataset
from endoscopy.data.frames.samplers import EpochSampler


class BatchOrder(DistributedSampler[tuple[int, list[int]]]):
    """Cut the rows of a rank into batches, each with its epoch.

    It is a DistributedSampler, since it distributes rows over ranks, so that Lightning does not
    insert its own.

    Args:
        sampler: Rows of an epoch.
        batch_size: Rows of a batch on this rank.
        even: Make all batches nearly equally long, and equally many on every rank; otherwise all
            but the last have ``batch_size`` rows.

    Attributes:
        start: Batch that the next pass begins with, set by a resume; later passes begin at 0.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, *, even: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.rows, self.batch_size, self.even = sampler, batch_size, even
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        longest = -(-self.rows.num_rows // self.rows.num_replicas)
        return -(-longest // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, number = self.rows.epoch, len(self)
        rows = self.rows.shard(epoch)
        ends = np.arange(1, number) * self.batch_size
        batches = np.array_split(rows, number) if self.even else np.split(rows, ends)
        first, self.start = self.start, 0
        for batch in batches[first:]:
            yield epoch, batch.tolist()


class FrameLoader(DataLoader[Batch]):
    """Load batches in order, with any number of worker processes; make one with :meth:`over`.

    Attributes:
        position: The next batch of the current pass, or of the last one.
    """

    position = 0

    @classmethod
    def over(cls, batches: BatchDataset, order: BatchOrder, num_workers: int = 0) -> FrameLoader:
        """Return a loader of the batches in that order.

        It draws no random number from the global generator, so that a resumed run draws as many.
        """
        return cls(
            batches,
            batch_size=None,
            sampler=order,  # type: ignore[arg-type]
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        assert isinstance(self.sampler, BatchOrder)
        self.position = self.sampler.start
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the batch that comes next."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the batch of ``state``, without reading those before it."""
        assert isinstance(self.sampler, BatchOrder)
        self.position = self.sampler.start = state["position"] % len(self)
