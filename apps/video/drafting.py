"""The schema of any table as a configuration, with the reason for every column."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from core_gates.errors import GatesError
from harness.files import replacing, write_text
from recsys.columns.column_auc import SUSPICIOUS
from recsys.columns.numbers import numbers_of
from recsys.data.leaks import find_giveaways, find_leaks, repeated_rows
from recsys.data.readers.own_table import OwnTable
from recsys.data.tables import PARTS, RankingTables
from recsys.infer import STRONG
from recsys.schema import FeatureSchema

CONFIG, REPORT = "table.yaml", "report.md"


@dataclass(frozen=True)
class Columns:
    """What you know of the columns of your table.

    Attributes:
        labels: Columns with 0 and 1 that are predicted.
        user: Column of the user.
        item: Column of what is ranked.
        time: Column that orders the rows.
        weight: Column of sample weights.
        drop: Columns that must not be features, such as what happens after the label.
        missing: Words in text that are null, such as NA, also wherever the model is used.
        dim: Features of an embedding.
    """

    labels: tuple[str, ...] = ()
    user: str = ""
    item: str = ""
    time: str = ""
    weight: str = ""
    drop: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    dim: int = 8


def draft(source: Path, columns: Columns, folder: Path) -> None:
    """Write a configuration with the drafted schema, and the report of its columns.

    Raises:
        GatesError: The table cannot be read, or no column could be a feature.
    """
    try:
        table = OwnTable(str(source.absolute()), **dataclasses.asdict(columns))
    except ValueError as error:
        raise GatesError(f"--table is wrong: {error}") from error
    tables = table.read()
    init = {
        "path": table.path,
        "split": tables.notes[0].removeprefix("split by "),
        "missing": list(columns.missing),
        "schema": plain(tables.schema),
    }
    kind = "recsys.data.readers.own_table.OwnTable"
    content = {"data": {"source": {"class_path": kind, "init_args": init}}}
    text = report(tables, columns)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        write_text(temporary / CONFIG, yaml.safe_dump(content, sort_keys=False))
        write_text(temporary / REPORT, text)
    print(text)
    words = f"--config table --config {folder / CONFIG} --name {folder.name}"
    print(f"train on it by: gates video fit {words}")
    print(f"compare networks and baselines on it by: gates video evaluate {words}")
    print(folder)


def report(tables: RankingTables, columns: Columns) -> str:
    """Return why each column became what it is, and what may leak, as Markdown."""
    schema, train = tables.schema, tables.train
    sizes = ", ".join(f"{len(tables.part(part)):,} {part}" for part in PARTS)
    lines = [f"# {tables.name}", "", f"Rows: {sizes}; {tables.notes[0]}.", "", "## Labels", ""]
    for task in schema.tasks:
        rate = np.nanmean(numbers_of(train[task.column]))
        lines.append(f"- {task.name}: mean {rate:.4g}")
    lines += ["", "## Columns", "", *(f"- {note}" for note in tables.notes[1:]), "", "## Leaks", ""]
    leaks = [*find_leaks(train, schema, STRONG), *find_giveaways(train, schema)]
    lines += [f"- {leak}" for leak in leaks] or [
        f"No feature alone predicts a label with AUC above {STRONG}, and no value of one implies a "
        f"label; columns above {SUSPICIOUS} are left out, see above."
    ]
    keys = [name for name in (columns.user, columns.item, columns.time) if name]
    if len(keys) > 1:
        count = repeated_rows(train, tables.test, keys)
        lines += ["", f"{count:,} test rows repeat {', '.join(keys)} of a training row."]
    return "\n".join(lines) + "\n"


def plain(schema: FeatureSchema) -> dict[str, Any]:
    """Return a schema as plain values, without those that are as by default."""
    return {
        name: [_changed(entry) for entry in value] if isinstance(value, tuple) else value
        for name, value in _changed(schema).items()
    }


def _changed(entry: Any) -> dict[str, Any]:
    values: Iterable[tuple[str, Any, Any]] = (
        (field.name, getattr(entry, field.name), field.default)
        for field in dataclasses.fields(entry)
    )
    return {
        name: list(value) if name == "of" and isinstance(value, tuple) else value
        for name, value, default in values
        if value != default
    }
