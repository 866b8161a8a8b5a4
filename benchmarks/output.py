"""Results as a table on the terminal and as a CSV file that names the device."""

import csv
import io
import re
from pathlib import Path
from typing import Any, TypedDict

from rich.markup import escape
from rich.table import Table

from apps.files import write_text
from apps.scores import number

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


def table(title: str, result: Result) -> Table:
    """Rows grouped by comparison.

    Args:
        title: Name of the suite or op.
        result: What was measured.
    """
    shown = Table(title=f"{title} on {result['device']}", title_justify="left")
    shown.add_column("")
    for column in ("time", "unit", "ratio", "of limit", "bar"):
        shown.add_column(column, justify="right", no_wrap=True)
    group = None
    for row in result["rows"]:
        comparison, _, variant = row["name"].partition(" · ")
        if comparison != group:
            shown.add_row(f"[bold]{escape(comparison)}[/]")
            group = comparison
        share, ratio, bar = row["share_of_limit"], row["ratio"], row["bar"]
        verdict = _VERDICTS[row["met"]]
        shown.add_row(
            f"  {escape(variant)}",
            number(row["value"]),
            row["unit"],
            "" if ratio is None else f"{ratio:.3f}",
            "" if share is None else f"{100 * share:.0f} %",
            "" if bar is None else f"<= {bar:g}{verdict}",
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
