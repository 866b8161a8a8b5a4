"""How much memory a process takes together with those that it has started."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROC = Path("/proc")
EVERY = 0.2  # seconds
KB = 1024


def resident(pid: int) -> int:
    """Return the bytes in memory of a process and its descendants; 0 if it has ended.

    The process counts with all of its resident pages, its descendants with their *proportional*
    ones: a page that n processes share counts 1 / n in each, so that what workers have in common is
    counted once. Libraries that the process and its workers share are counted a little twice.

    Args:
        pid: Of the process; on Linux.
    """
    own = _field(pid, "Rss")
    return own + sum(_field(one, "Pss") for one in descendants(pid)) if own else 0


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, those that they have started, and so on."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            state = path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has just ended
            continue
        parent = int(state.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], list(children.get(pid, ()))
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += children.get(one, ())
    return found


class MemoryMeter:
    """The most memory that a process and its descendants took while a ``with`` block ran.

    Args:
        pid: Of the process; this one by default.
        every: Seconds between two samples.

    Attributes:
        peak: Bytes, see :func:`resident`; 0 where the system does not tell.
    """

    def __init__(self, pid: int | None = None, every: float = EVERY) -> None:
        self.pid, self.every, self.peak = os.getpid() if pid is None else pid, every, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def sample(self) -> int:
        """Return the bytes at this moment."""
        now = resident(self.pid)
        self.peak = max(self.peak, now)
        return now

    def _follow(self) -> None:
        while not self._end.is_set():
            begin = time.monotonic()
            self.sample()
            self._end.wait(max(0.0, self.every - (time.monotonic() - begin)))


def _field(pid: int, name: str) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended, or belongs to someone else
        return 0
    for line in lines:
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * KB
    return 0
