"""Progress of work that is not a training run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
STEPS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
SHORT = 10.0  # seconds of steps that plain lines pass over


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


def stepping(label: str, items: Iterable[T], *, seconds: float = 15.0) -> Iterator[T]:
    """Yield items one by one, and show which of them is at work.

    Args:
        label: What is being done with each.
        items: Shown by their ``name``, or as text.
        seconds: Least time between two plain lines.
    """
    every = list(items)
    begin = last = time.monotonic()
    if sys.stdout.isatty():
        with Progress(*STEPS) as bar:
            task = bar.add_task(label, total=len(every))
            for number, item in enumerate(every):
                bar.update(task, completed=number, description=f"{label} {_name(item)}")
                yield item
            bar.update(task, completed=len(every), description=label)
        return
    for number, item in enumerate(every, 1):
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            place = f"{number} of {len(every)}  {last - begin:.0f} s"
            print(f"{label} {_name(item)}  {place}", flush=True)
        yield item
    _print_end(label, begin)


@contextmanager
def working(label: str) -> Iterator[None]:
    """Show that one long step is at work.

    Args:
        label: What is being done.
    """
    begin = time.monotonic()
    if sys.stdout.isatty():
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        ) as bar:
            task = bar.add_task(label, total=1)
            yield
            bar.update(task, completed=1)
        return
    yield
    _print_end(label, begin)


def _print_end(label: str, begin: float) -> None:
    """Print a plain line on how long it took, unless that is too short to matter."""
    if (took := time.monotonic() - begin) >= SHORT:
        print(f"{label}  {took:.1f} s", flush=True)


def _name(item: object) -> str:
    return str(getattr(item, "name", item))
