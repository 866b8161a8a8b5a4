"""Scores of evaluation and audits in one file, and the first line of their report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError
from harness.experiment.scores import Bar, Row, read_scores, write_scores
from harness.files.atomic import write_json

AUDIT = "audit: "
HEADLINE = "headline.json"


def write_part(
    path: Path,
    *,
    audit: bool,
    config_path: Path | None,
    seeds: Sequence[int],
    rows: Iterable[Row],
    bars: Iterable[Bar],
) -> Path:
    """Replace the figures of the evaluation, or those of the same audits; leave the others.

    Args:
        path: ``scores.json``.
        audit: Whether the figures are those of audits, whose tasks and bars begin with ``audit:``.
        config_path: Configuration that they belong to.
        seeds: Seeds behind them.
        rows: Figures.
        bars: Bars.
    """
    rows, bars = list(rows), list(bars)
    old_rows, old_bars, old_seeds = _read(path)
    tasks, names = {row.task for row in rows}, {bar.name for bar in bars}

    def is_kept(name: str) -> bool:
        return name not in (tasks | names) if audit else name.startswith(AUDIT)

    kept_rows = [row for row in old_rows if is_kept(row.task)]
    kept_bars = [bar for bar in old_bars if is_kept(bar.name)]
    return write_scores(
        path,
        app="endoscopy",
        config_path=config_path,
        seeds=sorted({*seeds, *(old_seeds if audit else ())}),
        rows=[*kept_rows, *rows] if audit else [*rows, *kept_rows],
        bars=[*kept_bars, *bars] if audit else [*bars, *kept_bars],
    )


def write_headline(folder: Path, headline: str, note: str) -> None:
    """Keep the first line of the report."""
    write_json(folder / HEADLINE, {"headline": headline, "note": note})


def read_headline(folder: Path) -> tuple[str, str]:
    """Return headline and note; empty before an evaluation.

    Raises:
        GatesError: The file is damaged.
    """
    path = folder / HEADLINE
    if not path.is_file():
        return "", ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["headline"], content["note"]
    except (ValueError, KeyError, TypeError) as error:
        raise GatesError(f"{path} is damaged: run `gates endoscopy evaluate` again") from error


def _read(path: Path) -> tuple[list[Row], list[Bar], list[int]]:
    """Return what a file of scores holds; nothing if there is none."""
    try:
        content = read_scores(path, "endoscopy")
    except GatesError:  # missing, or damaged and about to be replaced
        return [], [], []
    restore: Callable[[Any], Any] = lambda value: math.nan if value is None else value  # noqa: E731
    rows = [Row(**{name: restore(v) for name, v in row.items()}) for row in content["rows"]]
    bars = [
        Bar(bar["name"], restore(bar["value"]), bar["sense"], bar["bar"], bar["unit"])
        for bar in content["bars"]
    ]
    return rows, bars, list(content["seeds"])
