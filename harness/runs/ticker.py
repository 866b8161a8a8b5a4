"""Progress of work that is not a training run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def ticking(label: str, total: int, *, seconds: float = 15.0) -> Iterator[Callable[[], None]]:
    """Yield a function to be called after each of ``total`` pieces of work.

    Args:
        label: What is being done.
        total: Number of calls.
        seconds: Least time between two plain lines.
    """
    done = 0
    with counting(label, seconds=seconds) as count:

        def tick() -> None:
            nonlocal done
            done += 1
            count(done, total)

        yield tick


@contextmanager
def counting(label: str, *, seconds: float = 15.0) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function to be called with the pieces that are done, and all of them if known.

    Args:
        label: What is being done.
        seconds: Least time between two plain lines.
    """
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    begin = last = time.monotonic()

    def count(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            of = f" of {total}" if total else ""
            print(f"{label}  {done}{of}  {last - begin:.0f} s", flush=True)

    yield count
    print(f"{label}  {time.monotonic() - begin:.1f} s", flush=True)
