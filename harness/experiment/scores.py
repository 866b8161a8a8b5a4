"""Scores on the terminal and as ``scores.md``: a table per task, the bars, the path last."""

import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError
from harness.evidence import smaller_is_better
from harness.evidence.rows import Bar, Row
from harness.experiment.tuning import Choice
from harness.files import Data, sha256, write_json
from harness.files.atomic import write_text
from harness.runs.folder import git_revision

WORDS = {"method", "task", "metric", "name", "sense", "unit", "note"}
OPTIONAL = {"note"}  # of rows and bars; left out where it is empty


class Scores(NamedTuple):
    """The content of a ``scores.json``.

    Attributes:
        rows: Every figure.
        bars: Every bar.
        seeds: Seeds that the figures are based on.
        data: Data that the figures are based on.
        headline: What they show, in a sentence; empty if there is none.
        notes: What a reader must know.
        quick: Whether they come from a quick run on small samples.
        only: Methods that took part; all when empty.
    """

    rows: Sequence[Row] = ()
    bars: Sequence[Bar] = ()
    seeds: Sequence[int] = ()
    data: Sequence[Data] = ()
    headline: str = ""
    notes: Sequence[str] = ()
    quick: bool = False
    only: Sequence[str] = ()


def write_scores(path: Path, scores: Scores, *, app: str, config_path: Path | None) -> Path:
    """Write ``scores.json``; whether a bar is met is computed here, never given.

    Args:
        path: The file.
        scores: What it holds.
        app: Application.
        config_path: Configuration that the scores belong to; None for none.

    Raises:
        ValueError: A sense is neither ``<=`` nor ``>=``.
    """
    for bar in scores.bars:
        if bar.sense not in ("<=", ">="):
            raise ValueError(f"bar {bar.name!r} needs the sense '<=' or '>=', found {bar.sense!r}")
    config = {"name": None, "sha256": None}
    if config_path is not None:
        config = {"name": config_path.name, "sha256": sha256(config_path)}  # type: ignore[dict-item]
    content = {
        "app": app,
        "config": config,
        "git": git_revision(),
        "seeds": [int(seed) for seed in scores.seeds],
        "quick": scores.quick,
        "only": list(scores.only),
        "headline": scores.headline,
        "notes": list(scores.notes),
        "data": [source.state() for source in scores.data],
        "rows": [{**_plain(row), "versus": row.versus or None} for row in scores.rows],
        "bars": [{**_plain(bar), "met": bar.met} for bar in scores.bars],
    }
    return write_json(path, content)


def read_scores(path: Path, app: str, verb: str = "evaluate") -> Scores:
    """Return the scores that a ``scores.json`` holds.

    Args:
        path: The file.
        app: Application that writes the file again.
        verb: By which verb.

    Raises:
        GatesError: The file is missing or damaged.
    """
    again = f"run `gates {app} {verb}`"
    if not path.is_file():
        raise GatesError(f"{path} does not exist: {again} first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatesError(f"{path} is damaged ({error}): {again} again") from error
    if not isinstance(content, dict):
        raise GatesError(f"{path} is damaged (it holds no table of names): {again} again")
    for part, expected in (("rows", Row), ("bars", Bar)):
        fields = {*expected._fields, *(("met",) if expected is Bar else ())} - OPTIONAL
        if not _are_entries(content.get(part), fields):
            raise GatesError(
                f"{path} is damaged ({part} are not all {', '.join(sorted(fields))}): {again} again"
            )
    try:
        return Scores(
            [Row(**_restored(entry, Row)) for entry in content["rows"]],
            [Bar(**_restored(entry, Bar)) for entry in content["bars"]],
            [int(seed) for seed in content["seeds"]],
            [Data(**entry) for entry in content["data"]],
            str(content["headline"]),
            [str(note) for note in content["notes"]],
            bool(content["quick"]),
            [str(method) for method in content.get("only", [])],  # older ones have none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GatesError(f"{path} is damaged ({error!r}): {again} again") from error


def replace_part(old: Scores, new: Scores, part: str | tuple[str, ...]) -> Scores:
    """Return old scores in which those of a part are replaced.

    Args:
        old: Scores of the run so far.
        new: Those of the part.
        part: Beginning of the tasks and of the names of the bars that are replaced.
    """
    seeds = sorted({*old.seeds, *new.seeds})
    data = [
        *new.data,
        *(source for source in old.data if source.name not in {d.name for d in new.data}),
    ]
    return old._replace(
        rows=[*(row for row in old.rows if not row.task.startswith(part)), *new.rows],
        bars=[*(bar for bar in old.bars if not bar.name.startswith(part)), *new.bars],
        seeds=seeds,
        data=data,
    )


def _are_entries(entries: Any, fields: Iterable[str]) -> bool:
    """Return whether ``found`` is a list of entries with these fields: text, numbers or null."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and set(fields) <= entry.keys()
        and all(
            isinstance(entry[field], str)
            if field in WORDS
            else entry[field] is None
            or isinstance(entry[field], str if field == "versus" else int | float)
            for field in {*fields, *(OPTIONAL & entry.keys())}
        )
        for entry in entries
    )


def _restored(entry: dict[str, Any], kind: type[Row] | type[Bar]) -> dict[str, Any]:
    """Return the fields of a row or bar; null is NaN, or no method."""
    nothing = {"versus": ""}
    return {
        name: nothing.get(name, math.nan) if entry[name] is None else entry[name]
        for name in kind._fields
        if name in entry
    }


def _plain(row: Row | Bar) -> dict[str, Any]:
    """Fields as JSON values; numbers of numpy and torch become Python's."""
    plain: dict[str, Any] = {}
    for name, value in row._asdict().items():
        if name in OPTIONAL and not value:
            continue
        if isinstance(value, str | int):
            plain[name] = value
        elif name == "n":
            plain[name] = int(value)
        else:
            plain[name] = float(value)
    return plain


WIDEST = 120  # columns, also in a pipe
MISSED = 3  # missed bars that the verdict names
STAR = "* significant after Holm's correction for the number of methods, p < 0.05"
NOTHING = "–"
VERDICTS = {True: "met", False: "missed", None: "not measured"}


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        head: Its heading.
        metric: Figures in it.
        versus: Method that is subtracted; empty for the figures themselves.
    """

    head: str
    metric: str
    versus: str


def print_scores(
    path: Path,
    scores: Scores,
    *,
    metrics: Collection[str] = (),
    tasks: str | tuple[str, ...] = "",
    unprinted: Collection[str] = (),
    console: Console | None = None,
) -> None:
    """Print the rows of a ``scores.json``, what became of its bars, and its path.

    A difference stands next to the figure that it belongs to. Methods are sorted by the first
    metric, where its name tells which way is better. Columns that do not fit are named and counted.

    Args:
        path: The file.
        scores: Its content.
        metrics: Those that are printed; all when empty.
        tasks: Print only tasks, and bars, whose name begins so.
        unprinted: Tasks that are left to the report.
        console: Where to print; the standard output, as wide as the terminal and 120 columns at
            most, when None.
    """
    console = console or _terminal()
    rows = [
        row
        for row in scores.rows
        if (not metrics or row.metric in metrics or row.note)
        and row.task.startswith(tasks)
        and row.task not in unprinted
    ]
    shown, omitted = 0, dict[str, None]()
    for task in dict.fromkeys(row.task for row in rows):
        table, columns, left = _table(task, [r for r in rows if r.task == task], console.width)
        shown += sum(_fits(row, columns) for row in rows if row.task == task)
        omitted |= dict.fromkeys(left)
        console.print(table)
    for line in method_notes(rows):  # with commands to be copied
        console.print(escape(line), highlight=False, soft_wrap=True)
    for line in _further(scores, rows, shown, list(omitted), unprinted):
        console.print(escape(line), highlight=False)
    bars = [bar for bar in scores.bars if bar.name.startswith(tasks)]
    missed = [bar for bar in bars if bar.met is False]
    if said := " ".join(filter(None, (scores.headline, _count(bars)))):
        console.print(escape(said), highlight=False, soft_wrap=True)
    for bar in missed:
        console.print(escape(f"missed: {_miss(bar)}"), highlight=False, soft_wrap=True)
    console.print(str(path), highlight=False, soft_wrap=True)


def print_choices(choices: Mapping[str, Choice], console: Console | None = None) -> None:
    """Print what was chosen for each method, with its score and the number of trials.

    Args:
        choices: By method.
        console: Where to print; the standard output when None.
    """
    console = console or _terminal()
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
        scores = [trial["score"] for trial in choice.trials if trial.get("score") is not None]
        lowest = min((float(s) for s in scores if not math.isnan(s)), default=math.nan)
        cells = (method, setting, number(lowest), str(len(choice.trials)))
        table.add_row(*map(escape, cells))
    console.print(table)


def _terminal() -> Console:
    return Console(width=min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def verdict(bars: Sequence[Bar]) -> str:
    """Return a line on how many bars are met and which are missed by what; empty without bars."""
    missed = [_miss(bar) for bar in bars if bar.met is False]
    if not missed:
        return _count(bars)
    more = f"; {len(missed) - MISSED} more" if len(missed) > MISSED else ""
    return f"{_count(bars).rstrip('.')}; missed: {'; '.join(missed[:MISSED])}{more}."


def _count(bars: Sequence[Bar]) -> str:
    if not bars:
        return ""
    unknown = sum(bar.met is None for bar in bars)
    rest = f", {unknown} not measured" if unknown else ""
    return f"{sum(bar.met is True for bar in bars)} of {len(bars)} bars met{rest}."


def _miss(bar: Bar) -> str:
    sense = "≤" if bar.sense == "<=" else "≥"
    return f"{bar.name} {number(bar.value)}, needed {sense} {number(bar.bar)} {bar.unit}".strip()


def _further(
    scores: Scores,
    rows: Sequence[Row],
    shown: int,
    omitted: Sequence[str],
    unprinted: Collection[str],
) -> list[str]:
    """Return the lines below the tables: what an asterisk means, and where the rest is."""
    lines = [STAR] if any(row.versus and row.significant for row in rows) else []
    if omitted:
        lines.append(f"too wide for this terminal: {', '.join(omitted)}")
    if there := [task for task in unprinted if any(row.task == task for row in scores.rows)]:
        lines.append(f"{', '.join(there)}: in the report, report.html")
    if left := len(scores.rows) - shown:
        lines.append(f"{left} more figures are in the file below")
    return lines


def method_notes(rows: Iterable[Row]) -> list[str]:
    """Return the notes of rows without a figure, a line for each method and note."""
    return list(dict.fromkeys(f"{row.method}: {row.note}" for row in rows if row.note))


def _table(task: str, rows: Sequence[Row], width: int) -> tuple[Table, list[Column], list[str]]:
    """Return the figures of a task, the columns that fit, and the headings of those that do not."""
    cells = {(row.method, row.metric, row.versus): row for row in rows}
    whole = whole_numbers(rows)
    methods = _sorted(rows)
    table = Table(title=escape(spelled(task)), title_justify="left")
    table.add_column("method", no_wrap=True)
    left = width - max(map(len, (*methods, "method"))) - 4
    chosen: list[Column] = []
    omitted: list[str] = []
    filled: list[list[str]] = []
    for column in _columns(rows):
        of_task = [cells.get((method, column.metric, column.versus)) for method in methods]
        texts = [_text(row, whole) for row in of_task]
        if column.versus in methods:
            texts[methods.index(column.versus)] = ""
        need = max(map(len, (column.head, *texts))) + 3
        if need > left:
            omitted.append(column.head)
            continue
        left -= need
        chosen.append(column)
        filled.append(texts)
        table.add_column(escape(column.head), justify="right", no_wrap=True)
    for method, line in zip(methods, zip(*filled, strict=True), strict=False):
        table.add_row(escape(method), *map(escape, line))
    return table, chosen, omitted


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that hold a figure: every metric, each followed by its differences."""
    finite = [row for row in rows if math.isfinite(row.value)]
    columns = []
    for metric in dict.fromkeys(row.metric for row in finite):
        of_metric = [row for row in finite if row.metric == metric]
        alone = any(not row.versus for row in of_metric)
        for versus in sorted({row.versus for row in of_metric}):
            head = f"− {versus}" if versus and alone else f"{spelled(metric)} − {versus}"
            columns.append(Column(head if versus else spelled(metric), metric, versus))
    return columns


def _fits(row: Row, columns: Collection[Column]) -> bool:
    return any((row.metric, row.versus) == column[1:] for column in columns)


def _sorted(rows: Sequence[Row]) -> list[str]:
    """Return the methods, the best first where the first metric tells which way is better."""
    methods = list(dict.fromkeys(row.method for row in rows))
    first = next((row.metric for row in rows if not row.versus), "")
    smaller = smaller_is_better(first)
    if smaller is None:
        return methods
    values = {r.method: r.value for r in rows if r.metric == first and not r.versus}
    sign = 1 if smaller else -1

    def key(method: str) -> float:
        value = values.get(method, math.nan)
        return sign * value if math.isfinite(value) else math.inf

    return sorted(methods, key=key)


def _text(row: Row | None, whole: Collection[Row]) -> str:
    """Return a figure with its interval on one line, and an asterisk where it is significant."""
    if row is None or not math.isfinite(row.value):
        return NOTHING
    text = f"{row.value:,.0f}" if row in whole else number(row.value)
    if math.isfinite(row.low) and math.isfinite(row.high):
        text = f"{text} [{number(row.low)}, {number(row.high)}]"
    if not row.versus:
        return text
    return f"{text}{'*' if row.significant else ' '}"


def whole_numbers(rows: Sequence[Row]) -> set[Row]:
    """Return the counts among the rows of a table: all of a column, or all of a method, are whole.

    They are written without decimals.
    """
    fine = {row for row in rows if _is_whole(row)}
    rest = [row for row in rows if row not in fine and math.isfinite(row.value)]
    columns = {(row.metric, row.versus) for row in rest}
    lines = {row.label for row in rest}
    return {
        row for row in fine if (row.metric, row.versus) not in columns or row.label not in lines
    }


def _is_whole(row: Row) -> bool:
    return math.isfinite(row.value) and row.value == int(row.value) and not math.isfinite(row.low)


def spelled(name: str) -> str:
    """Return the name of a metric or task as readers see it: ``log_loss`` is ``log-loss``."""
    return name.replace("log_loss", "log-loss")


def number(value: float | None) -> str:
    """A figure with four significant digits, without an exponent where it is readable."""
    return _digits(value).replace("-", "−")


def _digits(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = 4 - len(str(int(abs(value)))) if abs(value) >= 1 else 4
        return f"{value:.{max(digits, 0)}f}"
    if 1e6 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.3g}"


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
             VERDICTS[bar.met]]
            for bar in bars
        ]  # fmt: skip
        lines += _markdown_table("Bars", ["bar", "figure", "limit", "verdict"], cells)
    for task in dict.fromkeys(row.task for row in rows):
        here = {(row.label, row.metric): row for row in rows if row.task == task}
        columns = list(dict.fromkeys(metric for _, metric in here))
        cells = [
            [method, *(_cell(here.get((method, column))) for column in columns)]
            for method in dict.fromkeys(method for method, _ in here)
        ]
        lines += _markdown_table(task, ["method", *map(spelled, columns)], cells)
    lines += [part for line in method_notes(rows) for part in ("", line)]
    return write_text(path, "\n".join(lines) + "\n")


def _markdown_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" * len(header) + "|"
    return ["", f"## {title}", "", _line(header), rule, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return number(row.value)
    return f"{number(row.value)} [{number(row.low)}, {number(row.high)}]"
