"""Loaders over shards: training batches that resume at the exact next one, and all rows once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from core_gates.errors import GatesError, check_at_least
from recsys.batch import Batch
from recsys.data.loader import owners_of
from video_multitask.stream.plan import StreamPlan
from video_multitask.stream.reader import Encoder, StreamReader, encode
from video_multitask.stream.shards import Group, Shards


class StreamLoader:
    """Training batches of a rank; batch n comes from worker n mod W.

    Which batch comes next is a number, kept in the checkpoint: a resumed loader reads nothing of
    what came before but the window that it is in.

    Args:
        shards: Training rows.
        encoder: Makes batches of them; workers get a copy.
        plan: With ``world`` times ``max(1, workers)`` streams.
        rank: This rank.
        world: Ranks.
        workers: Processes that read; 0 reads in this one.

    Attributes:
        epoch: Of the pass that runs, or comes next.
        position: Batch that comes next in the pass that runs, or ran last.

    Raises:
        ValueError: The plan has another number of streams.
    """

    def __init__(
        self,
        shards: Shards,
        encoder: Encoder,
        plan: StreamPlan,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        check_at_least(1, world=world)
        check_at_least(0, workers=workers, rank=rank)
        if plan.streams != world * max(1, workers):
            raise ValueError(
                f"the plan has {plan.streams} streams, expected {world} ranks × "
                f"{max(1, workers)} workers"
            )
        self.shards, self.encoder, self.plan = shards, encoder, plan
        self.rank, self.world, self.workers = rank, world, workers
        self.epoch = self.position = self._start = 0

    @property
    def sampler(self) -> StreamLoader:
        """The object that Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of a pass on this rank."""
        return self.plan.batches * max(1, self.workers)

    def __iter__(self) -> Iterator[Batch]:
        self.position, self._start = self._start, 0
        first = self.rank * max(1, self.workers)
        dataset = _Streams(self.shards, self.encoder, self.plan, first, self.epoch, self.position)
        for batch in _loader(dataset, self.workers):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the batch that comes next, its epoch, and what its number means."""
        return {
            "position": self.position,
            "epoch": self.epoch,
            "streams": self.plan.streams,
            "batches": self.plan.batches,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the batch of ``state``.

        Raises:
            GatesError: It was written with other ranks, workers, batches or rows.
        """
        found = {name: state[name] for name in ("streams", "batches")}
        expected = {"streams": self.plan.streams, "batches": self.plan.batches}
        if found != expected:
            raise GatesError(
                f"the checkpoint was written with {found['streams']} streams of "
                f"{found['batches']} batches, but there are {expected['streams']} of "
                f"{expected['batches']}: resume with its ranks, workers, batch size and data"
            )
        self.epoch = state["epoch"]
        self.position = self._start = state["position"] % len(self)


class EvaluationStream:
    """All rows once; with several ranks, those of a user on one rank.

    Every rank reads all row groups and keeps the users that it owns, so that metrics within users
    add up over ranks; each row group is one batch.

    Args:
        shards: Rows to evaluate.
        encoder: Makes batches of them.
        rank: This rank.
        world: Ranks.
        workers: Processes that read; 0 reads in this one.
        users: Fraction of the users whose rows are kept.
    """

    def __init__(
        self,
        shards: Shards,
        encoder: Encoder,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        users: float = 1.0,
    ) -> None:
        check_at_least(1, world=world)
        self.shards, self.encoder, self.users = shards, encoder, users
        self.rank, self.world, self.workers = rank, world, workers

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.shards.groups)

    def __iter__(self) -> Iterator[Batch]:
        groups = _Groups(self.shards, self.encoder, self.rank, self.world, self.users)
        return iter(_loader(groups, self.workers))


class _Streams(IterableDataset[Batch]):
    """What a worker of a rank reads; without workers, the one stream of the rank."""

    def __init__(
        self, shards: Shards, encoder: Encoder, plan: StreamPlan, first: int, epoch: int, done: int
    ) -> None:
        self.shards, self.encoder, self.plan = shards, encoder, plan
        self.first, self.epoch, self.done = first, epoch, done

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        own = (
            worker + self.done
        ) % workers  # the first batch comes from the worker whose turn it is
        start = self.done // workers + (own < self.done % workers)
        reader = StreamReader(self.shards, self.encoder, self.plan, self.first + own, self.epoch)
        for number in range(start, self.plan.batches):
            yield reader.batch(number)


class _Groups(IterableDataset[Batch]):
    """Row groups of a worker, users of a rank."""

    def __init__(
        self, shards: Shards, encoder: Encoder, rank: int, world: int, users: float
    ) -> None:
        self.shards, self.encoder, self.rank, self.world = shards, encoder, rank, world
        self.groups: list[Group] = shards.groups
        self.users = users

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        first = 0
        for number, group in enumerate(self.groups):
            if number % workers == worker:
                batch = encode(self.shards, [group], self.encoder, first, users=self.users)
                yield batch if self.world == 1 else batch.take(self._owned(batch))
            first += group.rows

    def _owned(self, batch: Batch) -> torch.Tensor:
        return torch.from_numpy(owners_of(batch.user.numpy(), self.world) == self.rank)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _loader(dataset: IterableDataset[Batch], workers: int) -> DataLoader[Batch]:
    """Return a loader that draws from no global random generator.

    Workers are forked from a server that has imported what they need and started no threads: those
    of polars do not survive a fork.
    """
    generator = torch.Generator()
    if not workers:
        return DataLoader(dataset, batch_size=None, generator=generator)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["polars", "torch", __name__, "recsys.transform"])
    return DataLoader(
        dataset,
        batch_size=None,
        generator=generator,
        num_workers=workers,
        multiprocessing_context=context,
    )
