"""A plan on the terminal and as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.files import write_json

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
