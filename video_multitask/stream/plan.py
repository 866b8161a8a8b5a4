"""Which rows a worker of a rank reads, in which order: a function of seed and epoch alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least, check_option
from video_multitask.stream.shards import Group

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
