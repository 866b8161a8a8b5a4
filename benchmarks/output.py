"""Results as tables on the terminal and as a CSV file that names the device."""

import csv
import io
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from harness.experiment.printing import number
from harness.files.atomic import write_text

Row = dict[str, Any]

_VERDICTS = {
    None: " [red]not measured[/]",
    True: " [green]met[/]",
    False: " [red]missed[/]",
}


class Result(TypedDict):
    """The JSON output: the device, and the rows."""

    device: str
    rows: list[Row]


def tables(title: str, result: Result) -> Group:
    """Return one table for each comparison.

    Args:
        title: Name of the suite or op.
        result: What was measured.
    """
    shown: list[RenderableType] = [f"[bold]{escape(title)}[/] on {escape(result['device'])}"]
    for comparison, rows in groupby(result["rows"], lambda row: row["name"].partition(" · ")[0]):
        shown.append(_table(comparison, rows))
    return Group(*shown)


def _table(comparison: str, rows: Iterable[Row]) -> Table:
    shown = Table(
        title=f"\n{escape(comparison)}", title_justify="left", title_style="bold", box=None
    )
    shown.add_column("", min_width=22)
    for column in ("value", "unit", "ratio", "of limit", "bar"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        share, ratio, bar = row["share_of_limit"], row["ratio"], row["bar"]
        shown.add_row(
            escape(row["name"].partition(" · ")[2]),
            number(row["value"]),
            row["unit"],
            "" if ratio is None else f"{ratio:.3f}",
            "" if share is None else f"{100 * share:.0f} %",
            "" if bar is None else f"<= {bar:g}{_VERDICTS[row['met']]}",
        )
    return shown


def write_csv(folder: Path, name: str, result: Result) -> Path | None:
    """Write ``<name>-<device>.csv``; nothing where nothing was measured.

    Args:
        folder: Folder of the results.
        name: Name of the suite or op.
        result: What was measured.
    """
    if not result["rows"]:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, ["device", *result["rows"][0]], lineterminator="\n")
    writer.writeheader()
    for row in result["rows"]:
        short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({"device": result["device"], **short})
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return write_text(folder / f"{name}-{device}.csv", text.getvalue())
