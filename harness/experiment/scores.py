"""``scores.json``: what ``evaluate`` of every application leaves for people and machines."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core_gates.errors import GatesError
from harness.evidence.rows import Bar, Row
from harness.files import Data, sha256, write_json
from harness.runs.environment import git_revision

WORDS = {"method", "task", "metric", "name", "sense", "unit"}


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
        "data": [one.state() for one in scores.data],
        "rows": [{**_plain(row), "versus": row.versus or None} for row in scores.rows],
        "bars": [{**_plain(bar), "met": bool(bar.met)} for bar in scores.bars],
    }
    return write_json(path, content)


def read_scores(path: Path, app: str) -> Scores:
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatesError(f"{path} is damaged ({error}): {again} again") from error
    if not isinstance(content, dict):
        raise GatesError(f"{path} is damaged (it holds no table of names): {again} again")
    for part, expected in (("rows", Row), ("bars", Bar)):
        fields = {*expected._fields, *(("met",) if expected is Bar else ())}
        if not _are_entries(content.get(part), fields):
            raise GatesError(
                f"{path} is damaged ({part} are not all {', '.join(sorted(fields))}): {again} again"
            )
    try:
        return Scores(
            [Row(**_restored(one, Row)) for one in content["rows"]],
            [Bar(**_restored(one, Bar)) for one in content["bars"]],
            [int(seed) for seed in content["seeds"]],
            [Data(**one) for one in content["data"]],
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
    data = [*new.data, *(one for one in old.data if one.name not in {d.name for d in new.data})]
    return old._replace(
        rows=[*(row for row in old.rows if not row.task.startswith(part)), *new.rows],
        bars=[*(bar for bar in old.bars if not bar.name.startswith(part)), *new.bars],
        seeds=seeds,
        data=data,
    )


def _are_entries(found: Any, fields: Iterable[str]) -> bool:
    """Return whether ``found`` is a list of entries with these fields: text, numbers or null."""
    return isinstance(found, list) and all(
        isinstance(entry, dict)
        and set(fields) <= entry.keys()
        and all(
            isinstance(entry[field], str)
            if field in WORDS
            else entry[field] is None
            or isinstance(entry[field], str if field == "versus" else int | float)
            for field in fields
        )
        for entry in found
    )


def _restored(entry: dict[str, Any], kind: type[Row] | type[Bar]) -> dict[str, Any]:
    """Return the fields of a row or bar; null is NaN, or no method."""
    nothing = {"versus": ""}
    return {
        name: nothing.get(name, math.nan) if entry[name] is None else entry[name]
        for name in kind._fields
    }


def _plain(row: Row | Bar) -> dict[str, Any]:
    """Fields as JSON values; numbers of numpy and torch become Python's."""
    plain: dict[str, Any] = {}
    for name, value in row._asdict().items():
        if isinstance(value, str | int):
            plain[name] = value
        elif name == "n":
            plain[name] = int(value)
        else:
            plain[name] = float(value)
    return plain
