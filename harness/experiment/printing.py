"""Scores on the terminal: one table per task, one verdict line, the path last."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.evidence.rows import Bar, Row
from harness.experiment.scores import Scores
from harness.experiment.tuning import Choice

WIDTH = 100  # columns, in a pipe too
MISSED = 3  # missed bars that the verdict names


def print_scores(
    path: Path,
    scores: Scores,
    *,
    metrics: Collection[str] = (),
    tasks: str | tuple[str, ...] = "",
    console: Console | None = None,
) -> None:
    """Print the rows of a ``scores.json``, what became of its bars, and its path.

    Columns that do not fit into 100 characters are left to the file, and counted.

    Args:
        path: The file.
        scores: Its content.
        metrics: Those that are printed; all when empty.
        tasks: Print only tasks, and bars, whose name begins so.
        console: Where to print; the standard output when None.
    """
    console = console or Console(width=WIDTH)
    rows = [
        row
        for row in scores.rows
        if (not metrics or row.metric in metrics) and row.task.startswith(tasks)
    ]
    shown = 0
    for task in dict.fromkeys(row.task for row in rows):
        table, count = _table(task, [row for row in rows if row.task == task])
        shown += count
        console.print(table)
    if left_out := len(scores.rows) - shown:
        console.print(f"{left_out} more figures are in the file below", highlight=False)
    bars = [bar for bar in scores.bars if bar.name.startswith(tasks)]
    if said := " ".join(filter(None, (scores.headline, verdict(bars)))):
        console.print(escape(said), highlight=False, soft_wrap=True)
    console.print(str(path), highlight=False, soft_wrap=True)


def print_choices(choices: Mapping[str, Choice], console: Console | None = None) -> None:
    """Print what was chosen for each method, with its score and the number of trials.

    Args:
        choices: By method.
        console: Where to print; the standard output when None.
    """
    console = console or Console(width=WIDTH)
    if not choices:
        console.print("nothing to choose: no method has settings that are searched")
        return
    table = Table(title="choices", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("setting")
    for name in ("lowest score", "trials"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, choice in choices.items():
        setting = ", ".join(
            f"{name} {number(value) if isinstance(value, float) else value}"
            for name, value in choice.setting.items()
        )
        scores = [float(one["score"]) for one in choice.trials if "score" in one]
        lowest = min((score for score in scores if not math.isnan(score)), default=math.nan)
        cells = (method, setting, number(lowest), str(len(choice.trials)))
        table.add_row(*map(escape, cells))
    console.print(table)


def verdict(bars: Sequence[Bar]) -> str:
    """Return a line on how many bars are met and which are missed by what; empty without bars."""
    if not bars:
        return ""
    missed = [
        f"{bar.name} {number(bar.value)}, needed {bar.sense} {number(bar.bar)} {bar.unit}".strip()
        for bar in bars
        if not bar.met
    ]
    more = f"; {len(missed) - MISSED} more" if len(missed) > MISSED else ""
    said = f"{len(bars) - len(missed)} of {len(bars)} bars met"
    return f"{said}; missed: {'; '.join(missed[:MISSED])}{more}." if missed else f"{said}."


def _table(task: str, rows: Sequence[Row]) -> tuple[Table, int]:
    """Return the figures of a task, one column per metric, as many as fit, and their number."""
    cells = {(row.label, row.metric): interval_text(row) for row in rows}
    methods = list(dict.fromkeys(row.label for row in rows))
    table = Table(title=escape(task), title_justify="left")
    table.add_column("method", no_wrap=True)
    left = WIDTH - max(map(len, (*methods, "method"))) - 4
    chosen: list[str] = []
    for metric in dict.fromkeys(row.metric for row in rows):
        texts = (metric, *(cells.get((method, metric), "–") for method in methods))
        left -= max(len(line) for text in texts for line in text.split("\n")) + 3
        if left < 0:
            break
        chosen.append(metric)
        table.add_column(metric, justify="right", no_wrap=True)
    for method in methods:
        table.add_row(escape(method), *(cells.get((method, metric), "–") for metric in chosen))
    return table, sum(row.metric in chosen for row in rows)


def interval_text(row: Row) -> str:
    """The figure above its interval, which is left out where there is none."""
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return number(row.value)
    return f"{number(row.value)}\n[{number(row.low)}, {number(row.high)}]"


def number(value: float | None) -> str:
    """A figure with four significant digits, without an exponent where it is readable."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = 4 - len(str(int(abs(value)))) if abs(value) >= 1 else 4
        return f"{value:.{max(digits, 0)}f}"
    if 1e6 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.3g}"
