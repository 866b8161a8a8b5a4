"""``gates tour``: every application in minutes, one table and one page."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError, MissingExtraError
from harness.report.page import Page, StopSkippedError, Tile, TourStop

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
        try:
            shown.append(_stop(name, target)(folder / name, _speaker(console)))
        except (MissingExtraError, StopSkippedError) as error:
            skipped.append(str(error))
            console.print(f"  skipped: {escape(str(error))}")
    if not shown:
        return 1
    seconds = time.monotonic() - begin
    console.print(_table(shown))
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


def _table(stops: Sequence[TourStop]) -> Table:
    table = Table(show_lines=True)  # text wraps, so that nothing is cut on a narrow screen
    for title in ("system", "metric", "value", "baseline", "verdict"):
        table.add_column(title, overflow="fold")
    for stop in stops:
        for row in stop.rows:
            color = {True: "green", False: "red", None: "default"}[row.good]
            cells = [escape(text) for text in row[:4]]
            table.add_row(*cells, f"[{color}]{escape(row.verdict)}[/]")
    return table


def _page(stops: Sequence[TourStop], skipped: Sequence[str], seconds: float) -> Page:
    rows = [row for stop in stops for row in stop.rows]
    claims = [row.good for row in rows if row.good is not None]
    page = Page(
        "Tour of the gatesuite",
        "Learned gates on ERA5 fields, rendered frames, a simulated feed and small images, against "
        "what they must beat.",
    )
    tiles = [
        Tile(
            "systems",
            str(len({row.system for row in rows})),
            f"{len(stops)} application{'s' if len(stops) > 1 else ''}",
        ),
        Tile("time", f"{seconds:.0f} s", "on this machine"),
    ]
    if claims:
        state = "good" if all(claims) else "bad"
        tiles.insert(
            1,
            Tile(
                "verdicts",
                f"{sum(claims)} of {len(claims)}",
                "ahead of every baseline in their row",
                state,
            ),
        )
    page.tiles(tiles).section("Overview")
    header = ["system", "metric", "value", "baseline", "verdict"]
    page.table(header, [list(row[:5]) for row in rows])
    for note in skipped:
        page.text(f"Skipped: {note}")
    for stop in stops:
        page.section(stop.title)
        stop.draw(page)
    return page
