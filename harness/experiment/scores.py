"""``scores.json``: what ``evaluate`` of every application leaves for people and machines."""

import hashlib
import json
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from core_gates.errors import GatesError
from harness.files.atomic import write_json
from harness.runs.environment import git_revision


class Row(NamedTuple):
    """One figure of one method on one task.

    Attributes:
        method: What was scored, for example ``oi``.
        task: On what, for example ``persistence 10 %``.
        metric: Which figure, with its unit where it has one, for example ``rmse_z500``.
        value: The figure; NaN where there is none.
        low: Lower end of its 95 % interval.
        high: Upper end.
        n: Independent units behind the interval.
    """

    method: str
    task: str
    metric: str
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1


class Bar(NamedTuple):
    """A figure that must not lie above, or below, a bar.

    Attributes:
        name: What is claimed.
        value: The figure; NaN counts as missed.
        sense: ``<=`` or ``>=``.
        bar: The bar.
        unit: Unit of figure and bar.
    """

    name: str
    value: float
    sense: Literal["<=", ">="]
    bar: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of the bar."""
        return self.value <= self.bar if self.sense == "<=" else self.value >= self.bar


def write_scores(
    path: Path,
    *,
    app: str,
    config_path: Path | None,
    seeds: Sequence[int],
    rows: Iterable[Row],
    bars: Iterable[Bar],
) -> Path:
    """Write ``scores.json``; whether a bar is met is computed here, never given.

    Args:
        path: The file.
        app: Application.
        config_path: Configuration that the scores belong to; None for none.
        seeds: Seeds behind the scores.
        rows: Every figure.
        bars: Every bar.

    Raises:
        ValueError: A sense is neither ``<=`` nor ``>=``.
    """
    bars = list(bars)
    for bar in bars:
        if bar.sense not in ("<=", ">="):
            raise ValueError(f"bar {bar.name!r} needs the sense '<=' or '>=', found {bar.sense!r}")
    content = {
        "app": app,
        "config": _config(config_path),
        "git": git_revision(),
        "seeds": [int(seed) for seed in seeds],
        "rows": [_plain(row) for row in rows],
        "bars": [{**_plain(bar), "met": bool(bar.met)} for bar in bars],
    }
    return write_json(path, content)


def read_scores(path: Path, app: str) -> dict[str, Any]:
    """Read a ``scores.json``.

    Args:
        path: The file.
        app: Application, whose ``evaluate`` writes the file again.

    Raises:
        GatesError: The file is missing or damaged.
    """
    again = f"run `gates {app} evaluate`"
    if not path.is_file():
        raise GatesError(f"{path} does not exist: {again} first")
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatesError(f"{path} is damaged ({error}): {again} again") from error
    if not isinstance(scores, dict):
        raise GatesError(f"{path} is damaged (it holds no table of names): {again} again")
    for part, expected in (("rows", Row), ("bars", Bar)):
        fields = {*expected._fields, *(("met",) if expected is Bar else ())}
        if not _are_entries(scores.get(part), fields):
            raise GatesError(
                f"{path} is damaged ({part} are not all {', '.join(sorted(fields))}): {again} again"
            )
    return scores


def _are_entries(found: Any, fields: set[str]) -> bool:
    """Tell whether ``found`` is a list of entries with these fields: words, numbers or nothing."""
    words = {"method", "task", "metric", "name", "sense", "unit"}
    return isinstance(found, list) and all(
        isinstance(entry, dict)
        and fields <= entry.keys()
        and all(
            isinstance(entry[field], str)
            if field in words
            else entry[field] is None or isinstance(entry[field], int | float)
            for field in fields
        )
        for entry in found
    )


def print_scores(
    path: Path,
    console: Console | None = None,
    *,
    metrics: Container[str] | None = None,
    tasks: str = "",
) -> None:
    """Print the rows and bars of a ``scores.json``, its path last.

    A task whose figures are wider than the console is printed as several tables.

    Args:
        path: The file.
        console: Where to print; the standard output when None.
        metrics: Those to be printed; all when None. What is left out is counted.
        tasks: Print only tasks, and bars, whose name begins so.
    """
    console = console or Console()
    scores = json.loads(path.read_text(encoding="utf-8"))
    shown = [
        row
        for row in scores["rows"]
        if (metrics is None or row["metric"] in metrics) and row["task"].startswith(tasks)
    ]
    for task in dict.fromkeys(row["task"] for row in shown):
        for table in _tables(task, [row for row in shown if row["task"] == task], console.width):
            console.print(table)
    if left_out := len(scores["rows"]) - len(shown):
        console.print(f"{left_out} more figures are in the file below", highlight=False)
    bars = [bar for bar in scores["bars"] if bar["name"].startswith(tasks)]
    if bars:
        table = Table("bar", "figure", "", "limit", "verdict", title="bars", title_justify="left")
        for bar in bars:
            verdict = "[green]met[/]" if bar["met"] else "[red]missed[/]"
            figure, limit = number(bar["value"]), f"{number(bar['bar'])} {bar['unit']}".strip()
            table.add_row(bar["name"], figure, bar["sense"], limit, verdict)
        console.print(table)
    console.print(str(path), highlight=False, soft_wrap=True)


def _tables(task: str, rows: list[dict[str, Any]], width: int) -> Iterator[Table]:
    """Yield the figures of one task in tables that fit the width, a column a metric."""
    cells = {(row["method"], row["metric"]): interval_text(row) for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    widths = {
        metric: max(
            len(line)
            for text in (metric, *(cells.get((method, metric), "–") for method in methods))
            for line in text.split("\n")
        )
        for metric in metrics
    }
    while metrics:
        table = Table(title=task, title_justify="left")
        table.add_column("method", no_wrap=True)
        left = width - max(map(len, (*methods, "method"))) - 4
        chosen: list[str] = []
        while metrics and (not chosen or left >= widths[metrics[0]] + 3):
            left -= widths[metrics[0]] + 3
            chosen.append(metrics.pop(0))
            table.add_column(chosen[-1], justify="right", no_wrap=True)
        for method in methods:
            table.add_row(method, *(cells.get((method, metric), "–") for metric in chosen))
        yield table


def interval_text(row: dict[str, Any] | None) -> str:
    """The figure above its interval, which is left out where there is none."""
    if row is None or row["value"] is None:
        return "–"
    if row["low"] is None or row["high"] is None:
        return number(row["value"])
    return f"{number(row['value'])}\n[{number(row['low'])}, {number(row['high'])}]"


def number(value: float | None) -> str:
    """A figure with four significant digits, without an exponent where it is readable."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = 4 - len(str(int(abs(value)))) if abs(value) >= 1 else 4
        return f"{value:.{max(digits, 0)}f}"
    return f"{value:.3g}"


def _config(path: Path | None) -> dict[str, str | None]:
    if path is None:
        return {"name": None, "sha256": None}
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _plain(row: Row | Bar) -> dict[str, Any]:
    """Fields as JSON values; numbers of numpy and torch become Python's."""
    plain: dict[str, Any] = {}
    for name, value in row._asdict().items():
        if isinstance(value, str | int):
            plain[name] = value
        else:
            plain[name] = float(value)
    return plain
