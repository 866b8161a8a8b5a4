"""What a terminal shows: progress of long work, tables of plans, no messages of libraries.

A bar on a terminal, plain lines elsewhere. Plain lines come at regular times, also while a single
piece takes long: nothing is silent.
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from core_gates.errors import GatesError
from harness.files import write_json

UNWANTED = (
    "The number of training batches",  # the log's interval exceeds the epoch: on purpose
    "The '.*dataloader' does not have many workers",  # small data is loaded faster without any
    "Your `IterableDataset` has `__len__` defined",  # streams here count their own steps
    "You're resuming from a checkpoint that ended before the epoch ended",  # see harness.runs.loops
    "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning's use of torch
    "isinstance\\(treespec, LeafSpec\\)",
    "Mismatch dtype between input and weight",  # RMS norms of diffusers under autocast
)


def quiet_lightning() -> None:
    """Keep Lightning to its warnings that matter here: no adverts, no list of absent hardware."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls of it
    for message in UNWANTED:
        warnings.filterwarnings("ignore", message=message)


_held: list[tuple[Any, ...]] | None = None  # None: warnings are shown at once


@contextmanager
def held_warnings() -> Iterator[None]:
    """Hold warnings back until the work begins; where an error is one line, they are not shown.

    The work begins at `release_warnings`, or at the end of the block.
    """
    global _held
    shown = warnings.showwarning

    def show(*words: Any, **more: Any) -> None:
        if _held is None:
            shown(*words, **more)
        else:
            _held.append(words)

    _held = []
    warnings.showwarning = show
    try:
        yield
    except (GatesError, OSError, SystemExit):
        _held = []
        raise
    finally:
        release_warnings()
        warnings.showwarning = shown


def release_warnings() -> None:
    """Show the warnings that were held back, and all further ones at once."""
    global _held
    waiting, _held = _held or [], None
    for words in waiting:
        warnings.showwarning(*words)


T = TypeVar("T")
STEPS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
SHORT = 10.0  # seconds until the first plain line; shorter work needs none at its end
EVERY = 15.0  # seconds between two plain lines


@contextmanager
def ticking(
    label: str, total: int, *, unit: str = "", seconds: float = EVERY
) -> Iterator[Callable[[], None]]:
    """Yield a function to be called after each of ``total`` pieces of work.

    Args:
        label: What is being done.
        total: Number of calls.
        unit: What is counted, in the plural, where it is not what the label names.
        seconds: Between two plain lines.
    """
    done = 0
    with counting(label, unit=unit, seconds=seconds) as count:
        count(0, total)

        def tick() -> None:
            nonlocal done
            done += 1
            count(done, total)

        yield tick


@contextmanager
def counting(
    label: str, *, unit: str = "", seconds: float = EVERY
) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function to be called with the pieces that are done, and all of them if known.

    Args:
        label: What is being done.
        unit: What is counted, in the plural, where it is not what the label names.
        seconds: Between two plain lines.
    """
    if sys.stdout.isatty():
        named = TextColumn(f"{{task.completed}} of {{task.total}} {unit}") if unit else None
        columns = (TextColumn("{task.description}"), BarColumn(), named, TimeRemainingColumn())
        with Progress(*filter(None, columns)) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    begin = time.monotonic()
    state: tuple[int, int | None] = (0, None)

    def count(done: int, total: int | None) -> None:
        nonlocal state
        state = done, total

    with _speaking(lambda took: f"{label}{_place(*state, unit, took)}", seconds):
        yield count
    print(f"{label}  {time.monotonic() - begin:.1f} s", flush=True)


def stepping(label: str, items: Iterable[T], *, seconds: float = EVERY) -> Iterator[T]:
    """Yield items one by one, and show which of them is at work.

    Args:
        label: What is being done with each.
        items: Shown by their ``name``, or as text.
        seconds: Between two plain lines.
    """
    every = list(items)
    begin = time.monotonic()
    if sys.stdout.isatty():
        with Progress(*STEPS) as bar:
            task = bar.add_task(label, total=len(every))
            for number, item in enumerate(every):
                bar.update(task, completed=number, description=f"{label}: {_name(item)}")
                yield item
            bar.update(task, completed=len(every), description=label)
        return
    state = label

    with _speaking(lambda took: f"{state}  {took:.0f} s", seconds):
        for number, item in enumerate(every, 1):
            state = f"{label}: {_name(item)}  {number} of {len(every)}"
            yield item
    _print_end(label, begin)


@contextmanager
def working(label: str, *, seconds: float = EVERY) -> Iterator[None]:
    """Show that one long step is at work.

    Args:
        label: What is being done.
        seconds: Between two plain lines.
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
    with _speaking(lambda took: f"{label}  {took:.0f} s", seconds):
        yield
    _print_end(label, begin)


@contextmanager
def _speaking(line: Callable[[float], str], seconds: float) -> Iterator[None]:
    """Print a line from time to time, given the seconds so far, whatever this thread does."""
    begin, ended = time.monotonic(), threading.Event()

    def speak() -> None:
        wait = min(SHORT, seconds)
        while not ended.wait(wait):
            print(line(time.monotonic() - begin), flush=True)
            wait = seconds

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _place(done: int, total: int | None, unit: str, took: float) -> str:
    """Return what is done of what, since when, and about how long the rest takes."""
    counted = f"  {done} of {total}" if total else f"  {done}" if done else ""
    counted += f" {unit}" if counted and unit else ""
    return f"{counted}  {timed(done, total, took)}"


def timed(done: int, total: float | None, took: float) -> str:
    """Return how long what is done took, and about how long the rest takes if that is known."""
    left = took * max(0, total - done) / done if total and done else 0.0
    return f"{took:.0f} s" + (f", about {_rounded(left)} left" if left else "")


def _rounded(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def _print_end(label: str, begin: float) -> None:
    """Print a plain line on how long it took, unless that is too short to matter."""
    if (took := time.monotonic() - begin) >= SHORT:
        print(f"{label}  {took:.1f} s", flush=True)


def _name(item: object) -> str:
    return str(getattr(item, "name", item))


UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Line(NamedTuple):
    """One figure of a plan.

    Attributes:
        name: What it is.
        value: The figure; NaN counts as unknown.
        unit: Its unit, such as ``bytes``; ``""`` for a number.
        note: How it comes about, in a few words.
    """

    name: str
    value: float
    unit: str = ""
    note: str = ""


Sections = Mapping[str, Sequence[Line]]


def readable(value: float, unit: str = "") -> str:
    """Return a figure with three significant digits and a decimal prefix, such as ``1.64 GB``."""
    short = {"bytes": "B", "bytes/s": "B/s"}.get(unit, unit)
    if value != value:
        return "unknown"
    for size, prefix in UNITS:
        if abs(value) >= 0.9995 * size:  # which three digits round up to 1
            return f"{value / size:.3g} {prefix}{short}".rstrip()
    return f"{value:.3g} {short}".rstrip()


def print_plan(sections: Sections, *, console: Console | None = None) -> None:
    """Print a table for each section."""
    console = console or Console(width=100)
    for title, lines in sections.items():
        table = Table(title=escape(title), title_justify="left", show_header=False)
        table.add_column("", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("")
        for line in lines:
            shown = escape(readable(line.value, line.unit))
            table.add_row(escape(line.name), shown, escape(line.note))
        console.print(table)


def write_plan(path: Path, sections: Sections) -> Path:
    """Write all figures as JSON: section -> name -> value, unit and note."""
    return write_json(
        path,
        {
            title: {
                line.name: {"value": line.value, "unit": line.unit, "note": line.note}
                for line in lines
            }
            for title, lines in sections.items()
        },
    )
