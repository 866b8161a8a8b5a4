"""Labels, masks, weights and users of a table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys.columns.canonical import RowError, keys_of_ids, numbers_of
from recsys.schema import FeatureSchema, Task, Threshold


class Targets(NamedTuple):
    """What is not a feature.

    Attributes:
        labels: 0 or 1 (N, T), float32.
        mask: True (N, T) where the task counts.
        weight: Sample weights (N,), float32.
        user: Number of the user (N,), int64; below 0 where there is none, in each row another.
        numbers: Logarithms (N, R) of regressions, over those of their scales; NaN where they do not
            count.
    """

    labels: NDArray[np.float32]
    mask: NDArray[np.bool_]
    weight: NDArray[np.float32]
    user: NDArray[np.int64]
    numbers: NDArray[np.float32]


def read_targets(
    table: pl.DataFrame, schema: FeatureSchema, *, labels: bool = True, first_row: int = 0
) -> Targets:
    """Return labels, masks, weights and users.

    Args:
        table: N rows.
        schema: Which columns they are.
        labels: Whether there are labels; without, they are 0 and no task counts.
        first_row: Rows before these; they number the users where no column does.

    Raises:
        RowError: A label or mask is neither 0 nor 1, a label is missing where its task counts, a
            weight is negative or missing, or a user is no whole number.
    """
    shape = len(table), len(schema.tasks)
    labels_of_tasks, mask = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    weight = np.ones(len(table), np.float32)
    measured = {
        regression.name: _measured(table, regression) for regression in schema.regressions if labels
    }
    for number, task in enumerate(schema.tasks if labels else ()):
        counted = _truth(table[task.mask], np.zeros(len(table), np.bool_)) if task.mask else None
        optional = np.zeros(len(table), np.bool_) if counted is None else ~counted
        if task.threshold is not None:
            labels_of_tasks[:, number], measured_rows = _reached(
                task.threshold, *measured[task.threshold.of]
            )
            mask[:, number] = measured_rows & ~optional
            continue
        labels_of_tasks[:, number] = _truth(table[task.column], optional, required=True)
        mask[:, number] = ~optional
    if labels and schema.weight:
        weight[:] = _weights(table[schema.weight])
    users = users_of(table, schema.user, first_row, checked=labels)
    numbers = np.full((len(table), len(schema.regressions)), np.nan, np.float32)
    for number, (value, scale) in enumerate(measured.values()):
        with np.errstate(invalid="ignore", divide="ignore"):
            found_log = np.log(np.maximum(value, 1.0) / scale)
        numbers[:, number] = np.where(np.isfinite(found_log), found_log, np.nan)
    return Targets(labels_of_tasks, mask, weight, users, numbers)


def _measured(table: pl.DataFrame, task: Task) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the numbers of a regression (N,), NaN where it does not count, and their scales."""
    values = numbers_of(table[task.column])
    if (wrong := values < 0).any():
        row = int(wrong.argmax())
        raise RowError(task.column, row, f"it is {values[row]:g}, a number must be 0 or more")
    if task.mask:
        values = np.where(_truth(table[task.mask], np.zeros(len(table), np.bool_)), values, np.nan)
    return values, numbers_of(table[task.scale]) if task.scale else np.ones(len(table))


def _reached(
    threshold: Threshold, values: NDArray[np.float64], scale: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return whether numbers reach a threshold (N,), and where both are known."""
    factor, most = threshold.ends
    with np.errstate(invalid="ignore"):
        least = np.minimum(factor * scale, most)
    is_measured = ~np.isnan(values) & (scale > 0)
    return ((values >= least) != threshold.below) & is_measured, is_measured


def users_of(
    table: pl.DataFrame, user: str, first_row: int = 0, *, checked: bool = True
) -> NDArray[np.int64]:
    """Return the number of the user of each row (N,).

    Integers number themselves, strings are hashed, so that numbers agree between tables. A row
    whose user is missing is its own: row n has -1 - n. Without a column, each row is its own, too.

    Args:
        table: N rows.
        user: Column of the user.
        first_row: Rows before these.
        checked: Whether other numbers than integers are refused; else all of them are one user.

    Raises:
        RowError: A number has a fraction or exceeds 2^63 - 1.
    """
    rows = np.arange(first_row, first_row + len(table))
    if not user or user not in table.columns:
        return rows
    column = table[user]
    numbers, missing = keys_of_ids(column, checked=checked)
    if not column.dtype.is_numeric() and column.dtype != pl.Boolean:
        numbers = (numbers.view(np.uint64) >> np.uint64(1)).view(np.int64)
    return np.where(missing, -1 - rows, numbers)


def _truth(
    column: pl.Series, optional: NDArray[np.bool_], *, required: bool = False
) -> NDArray[np.bool_]:
    """Return a column of 0 and 1; missing is 0, and refused if ``required`` and not optional."""
    numbers = numbers_of(column)
    missing = np.isnan(numbers)
    wrong = (numbers != 0) & (numbers != 1) & ~missing
    if required:
        wrong |= missing & ~optional
    if wrong.any():
        row = int(wrong.argmax())
        what = "missing" if missing[row] else f"{numbers[row]:g}"
        raise RowError(column.name, row, f"it is {what}, a label or mask must be 0 or 1")
    return numbers == 1


def _weights(column: pl.Series) -> NDArray[np.float64]:
    numbers = numbers_of(column)
    wrong = ~(numbers >= 0)
    if wrong.any():
        row = int(wrong.argmax())
        what = "missing" if np.isnan(numbers[row]) else f"{numbers[row]:g}"
        raise RowError(column.name, row, f"it is {what}, a weight must be 0 or more")
    return numbers
