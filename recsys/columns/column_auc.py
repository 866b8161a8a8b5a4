"""How well one column alone predicts labels, and values with which a label is always the same."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys.columns.canonical import canonical, keys_of, kind_of, numbers_of
from recsys.columns.hashing import hash_integers

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
        present = column.is_not_null().to_numpy()
        names, groups = [ABSENT, PRESENT], present.astype(np.int64)
    else:
        texts = column.cast(pl.String)
        known_names = texts.drop_nulls().unique().sort().to_list()
        places = {name: place for place, name in enumerate(known_names)}
        names = [*(f"of {name!r}" for name in known_names), ABSENT]
        groups = np.array([places.get(text, len(places)) for text in texts.to_list()])
    return [
        implied
        for task in range(labels.shape[1])
        if (implied := _strongest(names, groups, labels[:, task] > 0, mask[:, task], task))
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
    strongest = None
    for name, count, hits in zip(names, rows.tolist(), positives.tolist(), strict=True):
        if hits not in (0, count) or count in (0, total) or not 0 < rate < 1:
            continue
        label = int(hits > 0)
        chance = count * math.log(rate if label else 1 - rate) + math.log(len(names))
        if chance < math.log(CHANCE) and (strongest is None or count > strongest.rows):
            strongest = Implied(name, task, label, count)
    return strongest


STRONG = 0.9  # AUC of a column alone that is worth a question
SUSPICIOUS = 0.95
"""AUC from which a column is taken for a label, or for what is known only after it."""

Counts = tuple[NDArray[np.int64], NDArray[np.int64]]

PRIOR = 1.0  # rows of the mean label that each group is given
FINEST = 256  # groups of a numeric column
FEWEST = 5  # rows of a class, with which an AUC means something


def column_aucs(
    column: pl.Series, labels: NDArray[np.float32], mask: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the AUC of the mean label of each value of a column, or of its numbers if larger.

    Means are taken over one half of the rows and judge the other, so that a column of distinct
    values does not predict its own labels. Numbers with more than 256 values are first ranked into
    256 groups; missing values are a group.

    Args:
        column: (N,) values of a sparse or dense feature.
        labels: (N, T) 0 or 1.
        mask: (N, T) true where a label counts.

    Returns:
        (T,) 0.5 to 1; NaN where a class has too few rows to be judged.
    """
    codes, ordered = _codes(column)
    groups = codes
    if ordered and codes.max(initial=0) > FINEST:
        ranks = pl.Series(codes).rank("average").to_numpy()
        groups = np.where(codes == 0, 0, 1 + (ranks * (FINEST / len(codes))).astype(np.int64))
    half = (hash_integers(np.arange(len(labels)), seed=11) >> np.uint64(63)).astype(np.bool_)
    areas_of_tasks = np.full(labels.shape[1], np.nan)
    for task in range(labels.shape[1]):
        counted, positive = mask[:, task], labels[:, task] > 0
        half_counts, other = (_counts(groups, positive, counted & part) for part in (half, ~half))
        areas = [(_auc(_means(*other), *half_counts) + _auc(_means(*half_counts), *other)) / 2]
        if ordered:
            counts_of_known = [counts[1:] for counts in _counts(codes, positive, counted)]
            area = _auc(np.arange(len(counts_of_known[0])), counts_of_known[0], counts_of_known[1])
            areas += [area, 1 - area]
        judged = [area for area in areas if not math.isnan(area)]
        areas_of_tasks[task] = max([*judged, 0.5]) if judged else math.nan
    return areas_of_tasks


def _codes(column: pl.Series) -> tuple[NDArray[np.int64], bool]:
    """Return a number for each value of a column (N,), and whether they are ordered.

    Ordered ones begin at 1, and 0 is missing.
    """
    if column.dtype.is_numeric():
        ranks = pl.Series(numbers_of(column)).fill_nan(None).rank("dense")
        return ranks.fill_null(0).cast(pl.Int64).to_numpy(), True
    values = canonical(column, kind_of(column.name, column.dtype) or "integer")
    return np.unique(keys_of(values)[0], return_inverse=True)[1], False


def _counts(
    groups: NDArray[np.int64], positive: NDArray[np.bool_], rows: NDArray[np.bool_]
) -> Counts:
    """Return the positive and the negative rows of each group."""
    most = int(groups.max(initial=0)) + 1
    of_group = np.bincount(groups[rows & positive], minlength=most)
    return of_group, np.bincount(groups[rows & ~positive], minlength=most)


def _means(positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean label of each group, drawn to that of all where it has few rows."""
    rows = positives + negatives
    mean = positives.sum() / max(rows.sum(), 1)
    return (positives + PRIOR * mean) / (rows + PRIOR)


def _auc(scores: NDArray[Any], positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> float:
    """Return the area under the ROC curve of groups of rows; NaN where a class has few rows."""
    total = int(positives.sum()), int(negatives.sum())
    if min(total) < FEWEST:
        return math.nan
    _, place = np.unique(scores, return_inverse=True)
    wins, losses = np.bincount(place, positives), np.bincount(place, negatives)
    return float(wins @ (losses.cumsum() - losses / 2) / (total[0] * total[1]))
