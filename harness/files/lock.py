"""Locks between processes, which end with the process in any way."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from core_gates.errors import GatesError
from harness.files.atomic import writing


@contextmanager
def locked(path: Path, place: Path, remedy: str) -> Iterator[None]:
    """Hold a lock, whose file goes when the block ends.

    A process that is killed lets it go at once, even if processes that it forked live on.

    Args:
        path: File of the lock. Folders above it that do not exist are made, and go with it unless
            the block has filled them.
        place: What is worked on, for the message.
        remedy: What to do instead of waiting.

    Raises:
        GatesError: Another process holds it, or its file cannot be written.
    """
    lock = FileLock(path, blocking=False)
    try:
        with writing(place):
            made = [folder for folder in path.parents if not folder.exists()]
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
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
