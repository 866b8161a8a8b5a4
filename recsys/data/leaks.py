"""Whether a table gives its labels away, for a schema that is there already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from recsys.columns.canonical import numbers_of, part_of
from recsys.columns.column_auc import STRONG, SUSPICIOUS, column_aucs, implied_labels
from recsys.data.doubts import HIERARCHICAL, of_hierarchy, of_rows
from recsys.data.tables import PARTS, RankingTables
from recsys.schema import Dense, FeatureSchema, Sparse, source_of
from recsys.transform.targets import read_targets


class Leak(NamedTuple):
    """A column that predicts a label nearly alone.

    Attributes:
        column: The column.
        task: The task.
        auc: Its area under the ROC curve.
    """

    column: str
    task: str
    auc: float

    def __str__(self) -> str:
        return (
            f"column {self.column!r} alone predicts {self.task!r} with AUC {self.auc:.3f}: it may "
            "be the label, or known only after it"
        )


def find_leaks(
    table: pl.DataFrame, schema: FeatureSchema, threshold: float = SUSPICIOUS
) -> list[Leak]:
    """Return the features that predict a label nearly alone, the strongest first.

    Args:
        table: Training rows.
        schema: Features and tasks.
        threshold: AUC from which a feature is suspicious.

    Raises:
        GatesError: A column is missing, or cannot be read.
    """
    schema.check_columns(table.columns)
    targets = read_targets(table, schema)
    leaks = []
    for name, column in _columns(table, schema).items():
        areas = column_aucs(column, targets.labels, targets.mask)
        for task, area in zip(schema.task_names, areas, strict=True):
            if area > threshold:
                leaks.append(Leak(name, task, float(area)))
    return sorted(leaks, key=lambda leak: -leak.auc)


class Giveaway(NamedTuple):
    """A value of a column with which a label is always the same.

    Attributes:
        column: The column.
        value: Which value, such as ``of 'x'``, or ``that is missing``.
        task: The task.
        label: 0 or 1.
        rows: Rows with the value.
    """

    column: str
    value: str
    task: str
    label: int
    rows: int

    def __str__(self) -> str:
        return (
            f"column {self.column!r}: in all {self.rows:,} rows with a value {self.value}, "
            f"{self.task!r} is {self.label}: it may be known only after it; if so, leave it out"
        )


def find_giveaways(table: pl.DataFrame, schema: FeatureSchema) -> list[Giveaway]:
    """Return the features one of whose values implies a label, users and items aside.

    See `recsys.data.leaks.implied_labels`.

    Args:
        table: Training rows.
        schema: Features and tasks.

    Raises:
        GatesError: A column is missing, or cannot be read.
    """
    schema.check_columns(table.columns)
    targets, keys = read_targets(table, schema), {schema.user, schema.item}
    return [
        Giveaway(name, implied.value, schema.task_names[implied.task], implied.label, implied.rows)
        for name, column in _columns(table, schema).items()
        if name not in keys
        for implied in implied_labels(column, targets.labels, targets.mask)
    ]


def _columns(table: pl.DataFrame, schema: FeatureSchema) -> dict[str, pl.Series]:
    """Return the values of sparse and dense features by name."""
    features: tuple[Sparse | Dense, ...] = (*schema.sparse, *schema.dense)
    return {
        feature.name: part_of(table[source_of(feature)], getattr(feature, "part", ""))
        for feature in features
    }


def chance_error(positives: int, negatives: int) -> float:
    """Return the standard error of the AUC of random scores: √((P + N + 1) / (12 P N)).

    It is that of independent rows; scores that are random per user vary more.
    """
    if not positives or not negatives:
        return math.nan
    return math.sqrt((positives + negatives + 1) / (12 * positives * negatives))


def permute_labels(
    table: pl.DataFrame, schema: FeatureSchema, also: Sequence[str] = (), seed: int = 0
) -> pl.DataFrame:
    """Return the table with its labels in random order, for a control that must predict nothing.

    Call it before any feature is computed: counts and histories made of the old labels would
    still know them. All label and mask columns are permuted over all rows, together.

    Args:
        table: All rows, of training, validation and test.
        schema: Tasks.
        also: Further columns that follow the label, such as a playing time.
        seed: Of the order.
    """
    order = np.random.default_rng(seed).permutation(len(table))
    return table.with_columns(table.select(*schema.labels, *also)[order])


def repeated_rows(one: pl.DataFrame, other: pl.DataFrame, keys: Sequence[str]) -> int:
    """Return how many rows of ``other`` have the keys of a row of ``one``.

    Args:
        one: Such as training rows.
        other: Such as test rows.
        keys: Columns that identify an event, such as user, item and time.

    Raises:
        GatesError: There are no keys, or a table lacks one.
    """
    for table in (one, other):
        if lacking := [key for key in keys if key not in table.columns]:
            raise GatesError(f"the table lacks the column {lacking[0]!r} that identifies its rows")
    if not keys:
        raise GatesError("no columns are named that identify a row, such as user, item and time")
    distinct = one.select(keys).unique()
    return len(other.select(keys).join(distinct, on=list(keys), how="semi"))


def report(tables: RankingTables, keys: Sequence[str] = ()) -> str:
    """Return why each column became what it is, and what may leak, as Markdown.

    Args:
        tables: With a drafted schema.
        keys: Columns that tell rows from each other, such as user, item and time.
    """
    schema, train = tables.schema, tables.train
    sizes = ", ".join(f"{len(tables.part(part)):,} {part}" for part in PARTS)
    lines = [f"# {tables.name}", "", f"Rows: {sizes}; {tables.notes[0]}.", "", "## Labels", ""]
    for task in schema.tasks:
        rate = np.nanmean(numbers_of(train[task.column]))
        lines.append(f"- {task.name}: mean {rate:.4g}, category {task.category}")
    for task in schema.regressions:
        mean = np.nanmean(numbers_of(train[task.column]))
        lines.append(f"- {task.name}: a number, mean {mean:.4g}, whose logarithm is predicted")
    doubts = [*of_rows(tables), *of_hierarchy((HIERARCHICAL,), schema)]
    lines += ["", *(f"- {doubt}" for doubt in doubts)] if doubts else []
    lines += ["", "## Columns", "", *(f"- {note}" for note in tables.notes[1:]), "", "## Leaks", ""]
    leaks = [*find_leaks(train, schema, STRONG), *find_giveaways(train, schema)]
    lines += [f"- {leak}" for leak in leaks] or [
        f"No feature alone predicts a label with AUC above {STRONG}, and no value of one implies a "
        f"label; columns above {SUSPICIOUS} are left out, see above."
    ]
    if len(keys) > 1:
        count = repeated_rows(train, tables.test, keys)
        lines += ["", f"{count:,} test rows repeat {', '.join(keys)} of a training row."]
    return "\n".join(lines) + "\n"
