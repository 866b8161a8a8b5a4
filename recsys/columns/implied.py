"""Values of a column with which a label is always the same: known after it, as a rule."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

FEW = 50  # values of a column that are looked at one by one
CHANCE = 1e-6  # of a value to have one label throughout, below which it is a rule
PRESENT, ABSENT = "that is not missing", "that is missing"


class Implied(NamedTuple):
    """A value with which a label is always the same.

    Attributes:
        value: Which value, such as ``of 'x'``, or ``that is missing``.
        task: Number of the label.
        label: 0 or 1.
        rows: Rows with the value.
    """

    value: str
    task: int
    label: int
    rows: int


def implied_labels(
    column: pl.Series, labels: NDArray[np.float32], mask: NDArray[np.bool_]
) -> list[Implied]:
    """Return for each label the value that implies it in most rows, if one does.

    A label is implied if it is the same in all rows of the value, and independent rows of the rate
    of the label would be so with a probability below 1e-6. Columns of more than 50 values are
    judged by whether they have one.

    Args:
        column: (N,) values, no lists.
        labels: (N, T) 0 or 1.
        mask: (N, T) true where a label counts.
    """
    if column.dtype.is_float():
        column = column.fill_nan(None)
    if column.n_unique() > FEW:
        known = column.is_not_null().to_numpy()
        names, groups = [ABSENT, PRESENT], known.astype(np.int64)
    else:
        texts = column.cast(pl.String)
        known_names = texts.drop_nulls().unique().sort().to_list()
        places = {name: place for place, name in enumerate(known_names)}
        names = [*(f"of {name!r}" for name in known_names), ABSENT]
        groups = np.array([places.get(text, len(places)) for text in texts.to_list()])
    return [
        found
        for task in range(labels.shape[1])
        if (found := _strongest(names, groups, labels[:, task] > 0, mask[:, task], task))
    ]


def _strongest(
    names: list[str],
    groups: NDArray[np.int64],
    positive: NDArray[np.bool_],
    counted: NDArray[np.bool_],
    task: int,
) -> Implied | None:
    rows = np.bincount(groups[counted], minlength=len(names))
    positives = np.bincount(groups[counted & positive], minlength=len(names))
    total, rate = rows.sum(), positives.sum() / max(rows.sum(), 1)
    found = None
    for name, count, hits in zip(names, rows.tolist(), positives.tolist(), strict=True):
        if hits not in (0, count) or count in (0, total) or not 0 < rate < 1:
            continue
        label = int(hits > 0)
        chance = count * math.log(rate if label else 1 - rate) + math.log(len(names))
        if chance < math.log(CHANCE) and (found is None or count > found.rows):
            found = Implied(name, task, label, count)
    return found
