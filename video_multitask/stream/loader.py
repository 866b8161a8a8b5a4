"""Loaders over shards: training batches that resume at the exact next one, and all rows once.

Which rows a worker of a rank reads, in which order, is a function of seed and epoch alone, and the
n-th batch is read without those before it.
"""

from __future__ import annotations

import multiprocessing
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.data.datamodule import owners_of
from recsys.data.tables import split_by_hash
from recsys.inputs import Batch
from recsys.schema import FeatureSchema
from video_multitask.stream.shards import Group, Shards

if TYPE_CHECKING:
    from torch import Tensor


Order = Literal["time", "shuffled"]

WINDOW = 2**16


class Window(NamedTuple):
    """Consecutive row groups that are shuffled together.

    Attributes:
        number: In its stream.
        groups: Row groups.
        first: Rows of the stream before it.
        rows: Rows.
    """

    number: int
    groups: tuple[Group, ...]
    first: int
    rows: int


@dataclass(frozen=True)
class StreamPlan:
    """How row groups become streams of batches, one stream for each worker of each rank.

    Every row group belongs to one stream. Full groups are dealt to the streams one after the other;
    smaller ones, at the ends of files, always go to the same streams, so that all passes have
    equally many batches. A stream reads its groups in time order or, newly in each epoch, in a
    random one; rows are shuffled within windows. Every stream gives as many full batches as the
    smallest one has; the rows that remain, less than a row group of each stream, are left out of
    that epoch.

    Attributes:
        groups: Row groups in time order.
        streams: Number of streams.
        batch_size: Rows of a batch.
        window: Rows that are shuffled together, rounded up to row groups; 0 keeps their order.
        order: ``time`` or ``shuffled``, of the row groups.
        seed: Of both orders.

    Raises:
        GatesError: There are too few rows for one batch in each stream.
        ValueError: A number is too small, or the order is unknown.
    """

    groups: tuple[Group, ...]
    streams: int
    batch_size: int
    window: int = WINDOW
    order: Order = "time"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes below 1 and logs without a batch for each stream."""
        check_at_least(1, streams=self.streams, batch_size=self.batch_size)
        check_at_least(0, window=self.window, seed=self.seed)
        check_option("order", self.order, ("time", "shuffled"))
        if not self.batches:
            rows = sum(group.rows for group in self.groups)
            raise GatesError(
                f"{rows} rows in {len(self.groups)} row groups give no batch of {self.batch_size} "
                f"to each of {self.streams} streams; use fewer workers, smaller batches or smaller "
                "row groups"
            )

    @cached_property
    def batches(self) -> int:
        """Batches of every stream in an epoch."""
        owned = self._owned(0)
        return min(sum(group.rows for group in stream) for stream in owned) // self.batch_size

    def windows(self, stream: int, epoch: int) -> list[Window]:
        """Return what a stream reads in an epoch, in order."""
        windows: list[Window] = []
        waiting: list[Group] = []
        first = rows = 0
        groups = self._owned(epoch)[stream]
        for number, group in enumerate(groups):
            waiting.append(group)
            rows += group.rows
            if rows >= max(1, self.window) or number == len(groups) - 1:
                windows.append(Window(len(windows), tuple(waiting), first, rows))
                first, rows, waiting = first + rows, 0, []
        return windows

    def permutation(self, stream: int, epoch: int, window: Window) -> NDArray[np.int64]:
        """Return the order of the rows of a window."""
        if not self.window:
            return np.arange(window.rows)
        rng = np.random.default_rng([self.seed, 2, epoch, stream, window.number])
        return rng.permutation(window.rows)

    def _owned(self, epoch: int) -> list[list[Group]]:
        """Return the row groups of each stream in an epoch, in the order of reading."""
        size = max((group.rows for group in self.groups), default=0)
        order = list(range(len(self.groups)))
        if self.order == "shuffled":
            np.random.default_rng([self.seed, 1, epoch]).shuffle(order)
        full = [k for k in order if self.groups[k].rows == size]
        owned = [full[stream :: self.streams] for stream in range(self.streams)]
        rows = [size * len(stream) for stream in owned]
        small = [k for k, group in enumerate(self.groups) if group.rows < size]
        for k in sorted(small, key=lambda k: -self.groups[k].rows):
            stream = rows.index(min(rows))
            owned[stream].append(k)
            rows[stream] += self.groups[k].rows
        place = {k: n for n, k in enumerate(order)}
        return [
            [self.groups[k] for k in sorted(stream, key=lambda k: place[k])] for stream in owned
        ]


def locate(windows: Sequence[Window], row: int) -> int:
    """Return the number of the window that has a row of the stream."""
    return bisect_right([window.first for window in windows], row) - 1


class Encoder(Protocol):
    """What makes batches of tables, such as ``recsys.transform.FeatureTransform``."""

    schema: FeatureSchema

    def batch(self, table: pl.DataFrame, *, labels: bool = True, first_row: int = 0) -> Batch:
        """Return the encoded rows of a table."""


def columns_of(schema: FeatureSchema) -> list[str]:
    """Return the columns of a table that a schema reads."""
    return list(dict.fromkeys([*schema.features, *schema.labels, *schema.keys]))


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
        written = {name: state[name] for name in ("streams", "batches")}
        expected = {"streams": self.plan.streams, "batches": self.plan.batches}
        if written != expected:
            raise GatesError(
                f"the checkpoint was written with {written['streams']} streams of "
                f"{written['batches']} batches, but there are {expected['streams']} of "
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
        turn = (
            worker + self.done
        ) % workers  # the first batch comes from the worker whose turn it is
        start = self.done // workers + (turn < self.done % workers)
        reader = StreamReader(self.shards, self.encoder, self.plan, self.first + turn, self.epoch)
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
