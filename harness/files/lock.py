"""Locks between processes, which end with the process in any way."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from core_gates.errors import GatesError


@contextmanager
def locked(path: Path, place: Path, remedy: str) -> Iterator[None]:
    """Hold a lock, whose file goes when the block ends.

    A process that is killed lets it go at once, even if processes that it forked live on.

    Args:
        path: File of the lock.
        place: What is worked on, for the message.
        remedy: What to do instead of waiting.

    Raises:
        GatesError: Another process holds it.
    """
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise GatesError(
            f"another process is at work on {place}: wait for it, or {remedy}"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
