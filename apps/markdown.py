"""``scores.md``: the headline figures of an evaluation, to be read as they are."""

import math
from collections.abc import Container, Sequence
from pathlib import Path

from apps.files import write_text
from apps.scores import Bar, Row, number


def write_markdown(
    path: Path, title: str, rows: Sequence[Row], bars: Sequence[Bar], metrics: Container[str]
) -> Path:
    """Write a table of the bars, and one for each task: a line a method, a column a metric.

    Args:
        path: The file.
        title: Its heading.
        rows: Figures, of which those of ``metrics`` are shown.
        bars: May be none.
        metrics: What is shown.
    """
    lines = [f"# {title}"]
    if bars:
        cells = [
            [bar.name, number(bar.value), f"{bar.sense} {number(bar.bar)} {bar.unit}".strip(),
             "met" if bar.met else "missed"]
            for bar in bars
        ]  # fmt: skip
        lines += _table("Bars", ["bar", "figure", "limit", "verdict"], cells)
    shown = [row for row in rows if row.metric in metrics]
    for task in dict.fromkeys(row.task for row in shown):
        here = {(row.method, row.metric): row for row in shown if row.task == task}
        columns = list(dict.fromkeys(metric for _, metric in here))
        cells = [
            [method, *(_cell(here.get((method, column))) for column in columns)]
            for method in dict.fromkeys(method for method, _ in here)
        ]
        lines += _table(task, ["method", *columns], cells)
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
