"""Scores of evaluation and audits in one file, and the first line of their report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from core_gates.errors import GatesError
from harness.evidence.rows import Bar, Row
from harness.experiment.scores import Scores, read_scores, write_scores
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
    scores = Scores(
        [*kept_rows, *rows] if audit else [*rows, *kept_rows],
        [*kept_bars, *bars] if audit else [*bars, *kept_bars],
        sorted({*seeds, *(old_seeds if audit else ())}),
    )
    return write_scores(path, scores, app="endoscopy", config_path=config_path)


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
    return list(content.rows), list(content.bars), list(content.seeds)
