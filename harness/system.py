"""Memory and processes as the operating system sees them: kept, measured, ended together."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names of mallopt(3)
TOP_PAD = 64 * 2**20  # bytes taken from the system at once
_BEFORE = """
import contextlib, ctypes, os, signal, sys
with contextlib.suppress(AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("its parent has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""PR_SET_PDEATHSIG of Linux, which outlives exec; the parent may have ended before it was set."""

PROC = Path("/proc")
EVERY = 0.2  # seconds
KB = 1024


def keep_freed_memory() -> bool:
    """Tell the malloc of glibc to keep freed memory, and return whether it took that.

    Large tensors are otherwise mapped and unmapped by every operation, and getting their pages
    again costs more than the work of many operations. Nothing happens where there is no glibc, or
    where the environment has a variable ``MALLOC_...`` already.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: TOP_PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def return_freed_memory() -> bool:
    """Return unused pages to the system, and return whether any were; for rare, large releases."""
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim is not None and trim(0))


def dependent(command: Sequence[str]) -> list[str]:
    """Return a command line for a child of this process that is killed when this process ends.

    A child would otherwise continue after a SIGKILL of its parent: a service would keep its port
    and its memory, a training would write into folders that another one resumes.

    Args:
        command: Program and its arguments. The thread that starts it counts as its parent.
            Elsewhere than on Linux it runs as it is.
    """
    return [sys.executable, "-S", "-E", "-c", _BEFORE, str(os.getpid()), *command]


def resident(pid: int) -> int:
    """Return the bytes in memory of a process and its descendants; 0 if it has ended.

    The process counts with all of its resident pages, its descendants with their *proportional*
    ones: a page that n processes share counts 1 / n in each, so that what workers have in common is
    counted once. Libraries that the process and its workers share are counted a little twice.

    Args:
        pid: Of the process; on Linux.
    """
    of_process = _field_of_process(pid, "Rss")
    return (
        of_process + sum(_field_of_process(child, "Pss") for child in descendants(pid))
        if of_process
        else 0
    )


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
    children_of, waiting = [], list(children.get(pid, ()))
    while waiting:
        child = waiting.pop()
        children_of.append(child)
        waiting += children.get(child, ())
    return children_of


class MemoryMeter:
    """The most memory that a process and its descendants took while a ``with`` block ran.

    Args:
        pid: Of the process; this one by default.
        every: Seconds between two samples.

    Attributes:
        peak: Bytes, see `resident`; 0 where the system does not tell.
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


def _field_of_process(pid: int, name: str) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended, or belongs to someone else
        return 0
    for line in lines:
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * KB
    return 0
