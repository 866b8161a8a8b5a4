"""``scores.md``: the headline figures of an evaluation, to be read as they are."""

import math
from collections.abc import Sequence
from pathlib import Path

from harness.evidence.rows import Bar, Row
from harness.experiment.printing import number, spelled
from harness.files.atomic import write_text


def write_markdown(
    path: Path, opening: Sequence[str], rows: Sequence[Row], bars: Sequence[Bar] = ()
) -> Path:
    """Write a table of the bars, and one for each task: one line per method, one column per metric.

    Args:
        path: The file.
        opening: Paragraphs above the tables.
        rows: Figures that are shown.
        bars: May be none.
    """
    lines = ["\n\n".join(opening)]
    if bars:
        cells = [
            [spelled(bar.name), number(bar.value),
             f"{bar.sense} {number(bar.bar)} {bar.unit}".strip(),
             "met" if bar.met else "missed"]
            for bar in bars
        ]  # fmt: skip
        lines += _table("Bars", ["bar", "figure", "limit", "verdict"], cells)
    for task in dict.fromkeys(row.task for row in rows):
        here = {(row.label, row.metric): row for row in rows if row.task == task}
        columns = list(dict.fromkeys(metric for _, metric in here))
        cells = [
            [method, *(_cell(here.get((method, column))) for column in columns)]
            for method in dict.fromkeys(method for method, _ in here)
        ]
        lines += _table(task, ["method", *map(spelled, columns)], cells)
    return write_text(path, "\n".join(lines) + "\n")


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" * len(header) + "|"
    lines = [_line(header), rule, *map(_line, rows)]
    return ["", f"## {title}", "", *lines]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return number(row.value)
    return f"{number(row.value)} [{number(row.low)}, {number(row.high)}]"
