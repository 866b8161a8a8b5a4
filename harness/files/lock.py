"""Locks between processes, which end with the process in any way."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core_gates.errors import GatesError


@contextmanager
def locked(path: Path, place: Path, remedy: str) -> Iterator[None]:
    """Hold a lock, whose file goes when the block ends.

    Args:
        path: File of the lock.
        place: What is worked on, for the message.
        remedy: What to do instead of waiting.

    Raises:
        GatesError: Another process holds it.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not path.exists() or os.fstat(lock.fileno()).st_ino != path.stat().st_ino
        except OSError:
            gone = True
        if gone:
            raise GatesError(f"another process is at work on {place}: wait for it, or {remedy}")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
