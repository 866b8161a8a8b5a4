"""The page that every application writes: one HTML file, no network, for laptop and phone."""

import base64
import csv
import html
import io
import math
import re
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from core_gates.errors import GatesError
from harness.evidence.rows import Bar, Row
from harness.experiment.scores import Scores, method_notes, number, spelled, whole_numbers
from harness.figures.forest import span_of
from harness.figures.style import COLUMNS, drawn_numbers
from harness.files.atomic import write_bytes, write_text
from harness.runs.folder import git_revision, package_version

FIGURES = "figures"
UNITS = "independent units"
PIXELS = 84  # of an inch of a figure, so that letters are of one size

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Header and rows."""


class Tile(NamedTuple):
    """A headline figure.

    Attributes:
        label: What it is.
        value: The figure with its unit.
        note: A few words below it.
        state: ``good``, ``bad`` or empty, which colors it.
    """

    label: str
    value: str
    note: str = ""
    state: str = ""


class Page:
    """A page built from top to bottom; every method returns the page.

    Figures are embedded, and also written as PNG with a CSV of their numbers: ``figures/`` next to
    the page. Text may hold ``**bold**`` and `` `code` ``; everything else is escaped. Example::

        Page("Digits").text("One run ...").figure(figure, "Errors").write(path)

    Args:
        title: Heading of the page.
        subtitle: A line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._files: dict[str, tuple[bytes, str]] = {}  # name to PNG and CSV

    def section(self, title: str) -> "Page":
        """Begin a section, which the navigation of the page links to."""
        anchor = f"s{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{_inline(title)}</h2>')
        return self

    def text(self, text: str) -> "Page":
        """Add paragraphs, separated by empty lines."""
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            self._parts.append(f"<p>{_inline(' '.join(paragraph.split()))}</p>")
        return self

    def tiles(self, tiles: Sequence[Tile]) -> "Page":
        """Add headline figures in a row."""
        boxes = "".join(
            f'<div class="tile {html.escape(tile.state)}"><span>{_inline(tile.label)}</span>'
            f"<b>{_inline(tile.value)}</b><small>{_inline(tile.note)}</small></div>"
            for tile in tiles
        )
        self._parts.append(f'<div class="tiles">{boxes}</div>')
        return self

    def code(self, text: str) -> "Page":
        """Add text as it stands, with its spaces and lines."""
        self._parts.append(f"<pre>{html.escape(text, quote=False)}</pre>")
        return self

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[Any]],
        caption: str = "",
    ) -> "Page":
        """Add a table; numbers are aligned to the right.

        Args:
            header: Names of the columns.
            rows: Cells; floats are shown with four significant digits, booleans as met or missed.
            caption: A line above it.

        Raises:
            ValueError: A row is longer or shorter than the header.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {row}")
        numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(header))]
        head = "".join(
            _cell("th", _inline(h), right) for h, right in zip(header, numeric, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(_cell("td", _show(v), right) for v, right in zip(row, numeric, strict=True))
            + "</tr>"
            for row in rows
        )
        self._add_table(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", caption)
        return self

    def figure(
        self,
        figure: Figure,
        caption: str = "",
        *,
        name: str = "",
        table: Table | None = None,
        dpi: int = 150,
    ) -> "Page":
        """Add a matplotlib figure as an embedded PNG.

        Args:
            figure: The figure; it is neither changed nor closed.
            caption: Text below it, also its description for screen readers.
            name: Of its files, ``figures/<name>.png`` and ``.csv``; that of the section if empty. A
                name that is taken gets a number.
            table: Header and rows of the CSV; what the figure draws if None.
            dpi: Resolution.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
        header, rows = table or (COLUMNS, drawn_numbers(figure))
        stem = _file_name(name or (self._sections[-1][1] if self._sections else self.title))
        number = 1 + sum(re.fullmatch(rf"{stem}(-\d+)?", name) is not None for name in self._files)
        stem = stem if number == 1 else f"{stem}-{number}"
        self._files[stem] = buffer.getvalue(), _csv(header, rows)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        below = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
        alt = html.escape(caption, quote=True)
        width = int.from_bytes(buffer.getvalue()[16:20]) * PIXELS // dpi
        self._parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{alt}" '
            f'style="width:{width}px">{below}</figure>'
        )
        return self

    def scores(self, scores: Scores, *, units: str = UNITS) -> "Page":
        """Add the bars and a table for each task.

        Args:
            scores: What is shown.
            units: What intervals are drawn from, such as ``users``.
        """
        if scores.bars:
            self._bars(scores.bars)
        for task in dict.fromkeys(row.task for row in scores.rows):
            of_task = [row for row in scores.rows if row.task == task]
            compared = [row for row in of_task if row.versus]
            if alone := [row for row in of_task if not row.versus]:
                self._task(task, alone, units)
            if compared:
                self._task(f"{task}, paired differences", compared, units)
        for line in method_notes(scores.rows):
            self.text(line)
        return self

    def write(self, path: Path) -> Path:
        """Write the page and, in ``figures/`` next to it, its figures; each file atomically."""
        for name, (image, numbers) in self._files.items():
            write_bytes(path.parent / FIGURES / f"{name}.png", image)
            write_text(path.parent / FIGURES / f"{name}.csv", numbers)
        return write_text(path, self.html())

    def html(self) -> str:
        """The whole page."""
        links = "".join(
            f'<a href="#{a}">{_inline(title.partition(":")[0])}</a>' for a, title in self._sections
        )
        navigation = f"<nav>{links}</nav>" if len(self._sections) > 1 else ""
        subtitle = f'<p class="lead">{_inline(self.subtitle)}</p>' if self.subtitle else ""
        style = (files("harness.report") / "report.css").read_text(encoding="utf-8")
        revision = (git_revision() or "no revision")[:12]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{html.escape(self.title)}</title><style>{style}</style></head><body>"
            f'<header><div class="wrap"><h1>{_inline(self.title)}</h1>{subtitle}</div></header>'
            f'{navigation}<main class="wrap">{"".join(self._parts)}</main>'
            f'<footer class="wrap">gatesuite {package_version("gatesuite")} · {revision}</footer>'
            "</body></html>\n"
        )

    def _add_table(self, inner: str, caption: str) -> None:
        above = f"<caption>{_inline(caption)}</caption>" if caption else ""
        self._parts.append(f'<div class="scroll"><table>{above}{inner}</table></div>')

    def _bars(self, bars: Sequence[Bar]) -> None:
        rows = [
            [
                spelled(bar.name),
                number(bar.value),
                f"{'≤' if bar.sense == '<=' else '≥'} {number(bar.bar)}",
                bar.unit,
                "not measured" if bar.met is None else bar.met,
            ]
            for bar in bars
        ]
        header = ["bar", "figure", "limit", "unit", "verdict"]
        met = sum(bar.met is True for bar in bars)
        self.table(header, rows, f"{met} of {len(bars)} bars met")

    def _task(self, task: str, rows: Sequence[Row], units: str) -> None:
        rows = [row for row in rows if math.isfinite(row.value)] or rows
        metrics = list(dict.fromkeys(row.metric for row in rows))
        whole = whole_numbers(rows)
        spans = {metric: _span([r for r in rows if r.metric == metric]) for metric in metrics}
        head = "<th>method</th>" + "".join(_cell("th", _inline(spelled(m)), True) for m in metrics)
        body = ""
        for method in dict.fromkeys(row.label for row in rows):
            cells = {row.metric: row for row in rows if row.label == method}
            marks = "".join(
                f"<td class=n>{_mark(cells.get(m), spans[m], whole)}</td>" for m in metrics
            )
            body += f"<tr><td>{_inline(method)}</td>{marks}</tr>"
        counts = [row.n for row in rows if math.isfinite(row.low)]
        note = f"95 % intervals over {span_of(counts)} {units}" if counts else ""
        if any(row.versus and row.significant for row in rows):
            note += "; * significant (Holm)"
        note = f"{task} · {note}" if note else task
        self._add_table(f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>", note)


def _inline(text: str) -> str:
    escaped = html.escape(str(text), quote=False)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escaped)


def _file_name(text: str) -> str:
    """Return words as a name of a file: ``Learning curves`` is ``learning-curves``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "figure"


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[≤≥]? ?[-−]?[\d.,]+(e[-−+]?\d+)?", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        verdict = "met" if value else "missed"
        return f'<span class="chip {verdict}">{verdict}</span>'
    if isinstance(value, float):
        return number(value)
    return _inline("–" if value is None else str(value))


def _cell(tag: str, inner: str, right: bool) -> str:
    return f"<{tag} class=n>{inner}</{tag}>" if right else f"<{tag}>{inner}</{tag}>"


def _span(rows: Sequence[Row]) -> tuple[float, float]:
    """Range of all values and intervals of one metric, for a common scale."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if math.isfinite(end)]
    return (min(ends), max(ends)) if ends else (0.0, 0.0)


def _mark(row: Row | None, span: tuple[float, float], whole: Collection[Row]) -> str:
    """A figure above its interval, drawn on the scale that all methods share."""
    if row is None or not math.isfinite(row.value):
        return "–"
    figure = f"{row.value:,.0f}" if row in whole else number(row.value)
    star = "*" if row.versus and row.significant else ""
    text = f"<b>{figure}{star}</b>"
    low, high = row.low, row.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return text
    left, width = span[0], (span[1] - span[0]) or 1.0
    x = [100 * (end - left) / width for end in (low, row.value, high)]
    title = f"{number(low)} to {number(high)}"
    return (
        f'{text}<small>{title}</small><svg viewBox="-4 0 108 8" preserveAspectRatio="none" '
        f'role="img" aria-label="{title}"><line class="axis" x1="-4" x2="104" y1="4" y2="4"/>'
        f'<line class="whisker" x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="4" y2="4"/>'
        f'<rect class="point" x="{x[1] - 1.5:.1f}" y="1" width="3" height="6" rx="1"/></svg>'
    )


class StopSkippedError(GatesError):
    """A stop has nothing to show, for the reason that the message gives."""


class TourRow(NamedTuple):
    """One line of the table.

    Attributes:
        system: What was shown, for example ``Adas (increment)``.
        metric: Which figure, with its unit.
        value: The figure.
        baseline: What it is compared with, with its figure.
        verdict: In words, such as ``better`` or ``within 1.2x``.
    """

    system: str
    metric: str
    value: str
    baseline: str
    verdict: str


class TourTask(NamedTuple):
    """What an application has done, for the first table.

    Attributes:
        task: What was to be done.
        result: What came out, with units.
        command: That does it on one's own data, or at length.
        seconds: That it took; those of the whole stop if None.
    """

    task: str
    result: str
    command: str
    seconds: float | None = None


class TourStop(NamedTuple):
    """What an application shows.

    Attributes:
        title: Heading of its part of the page.
        rows: Its lines of the table of claims.
        draw: Adds a picture, then text, tables and figures to the page, below the heading.
        done: Its lines of the table of tasks.
    """

    title: str
    rows: Sequence[TourRow]
    draw: Callable[[Page], None]
    done: Sequence[TourTask] = ()
