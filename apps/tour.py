"""``gates tour``: every application in minutes, one table and one page."""

from __future__ import annotations

import argparse
import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError, MissingExtraError
from harness.report.page import Page, StopSkippedError, TourStop

if TYPE_CHECKING:
    from apps.main import App

Stop = Callable[[Path, Callable[[str], None]], TourStop]


def main(arguments: Sequence[str], apps: Mapping[str, App]) -> int:
    """Run every stop, print the table and write ``<root>/tour/report.html``.

    A stop is a function ``(folder: Path, say: Callable[[str], None]) -> TourStop`` named in the
    table; it may write into the folder and tell its progress with ``say``. A stop whose extra is
    not installed is skipped with the line that installs it, one without weights with the reason.

    Args:
        arguments: ``--root`` and ``--only``.
        apps: The table of applications.

    Returns:
        0; 1 if nothing could be shown.

    Raises:
        GatesError: ``--only`` names no stop.
    """
    parser = argparse.ArgumentParser("gates tour", description=str(__doc__))
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--only", action="append", help="show this application only (repeatable)")
    options = parser.parse_args(list(arguments))
    stops = {name: app.stop for name, app in apps.items() if app.stop}
    for name in options.only or []:
        if name not in stops:
            raise GatesError(f"--only {name!r} is not a tour stop: choose from {list(stops)}")
    wanted = {name: stop for name, stop in stops.items() if name in (options.only or stops)}
    return _tour(wanted, options.root / "tour")


def _tour(wanted: Mapping[str, str], folder: Path) -> int:
    console, begin = Console(), time.monotonic()
    shown: list[TourStop] = []
    skipped: list[str] = []
    for name, target in wanted.items():
        console.print(f"[bold]{name}[/]")
        started = time.monotonic()
        try:
            stop = _stop(name, target)(folder / name, _speaker(console))
            spent = time.monotonic() - started
            done = [one._replace(seconds=one.seconds or spent) for one in stop.done]
            shown.append(stop._replace(done=done))
        except (MissingExtraError, StopSkippedError) as error:
            skipped.append(str(error))
            console.print(f"  skipped: {escape(str(error))}")
    if not shown:
        return 1
    seconds = time.monotonic() - begin
    for caption, (header, rows) in _tables(shown).items():
        console.print(_table(caption, header, rows))
    path = _page(shown, skipped, seconds).write(folder / "report.html")
    console.print(f"{seconds:.0f} s")
    console.print(str(path), highlight=False, soft_wrap=True)
    return 0


def _stop(name: str, target: str) -> Stop:
    module, _, function = target.partition(":")
    try:
        return cast(Stop, getattr(importlib.import_module(module), function))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("apps", "core_gates", "harness", name):
            raise
        raise MissingExtraError(name, package) from error


def _speaker(console: Console) -> Callable[[str], None]:
    begin = time.monotonic()

    def say(text: str) -> None:
        console.print(f"  [dim]{time.monotonic() - begin:5.1f} s[/]  {escape(text)}")

    return say


def _tables(stops: Sequence[TourStop]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return header and rows of what was done, and of what gates add to it."""
    tasks = [
        [one.task, one.result, f"{one.seconds:.0f}\N{NO-BREAK SPACE}s", f"`{one.command}`"]
        for stop in stops
        for one in stop.done
    ]
    claims = [
        [f"{row.system}: {row.metric}", f"**{row.verdict}** ({row.value}; {row.baseline})"]
        for stop in stops
        for row in stop.rows
    ]
    return {
        "What it does": (["task", "result", "time", "command"], tasks),
        "What the gates add": (["claim", "verdict (figure; compared with)"], claims),
    }


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=caption, show_lines=True)  # text wraps: nothing is cut on narrow screens
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(escape(re.sub(r"`|\*\*", "", text)) for text in row))
    return table


def _page(stops: Sequence[TourStop], skipped: Sequence[str], seconds: float) -> Page:
    page = Page(
        "Tour of the gatesuite",
        "Learned gates that assimilate weather, size polyps, rank a feed, draw, and complete code. "
        f"Analyses, renderings, drawings and texts were made on this machine in {seconds:.0f} s, "
        "and the networks of short video trained; all other networks ship with the package.",
    )
    for caption, (header, rows) in _tables(stops).items():
        page.section(caption).table(header, rows)
    for note in skipped:
        page.text(f"Skipped: {note}")
    for stop in stops:
        page.section(stop.title)
        stop.draw(page)
    return page
