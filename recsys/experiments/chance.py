"""What networks score that cannot know the labels: a control against leaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from harness.evidence import Bar, Row
from recsys.batch import Batch
from recsys.data.leaks import chance_error
from recsys.experiments.predictions import Probabilities
from recsys.metrics import auc

LIMIT = 3.0
"""Standard errors within which an AUC of 0.5 is due to chance."""

DISTANCE = "AUC, max |z|"  # |AUC − 0.5| in standard errors
_NORMAL = 1.96


class Chance(NamedTuple):
    """The AUC of a task, and what chance makes of 0.5.

    Attributes:
        task: The task.
        auc: Area under the ROC curve; NaN where a class is missing.
        error: Standard error of the AUC of labels in random order.
        positives: Positive rows.
    """

    task: str
    auc: float
    error: float
    positives: int

    @property
    def distance(self) -> float:
        """|AUC − 0.5| in standard errors; 0 for constant scores, NaN where a class is missing."""
        gap = abs(self.auc - 0.5)
        return 0.0 if gap == 0 else gap / self.error if self.error else math.nan


def permuted_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the standard error of the AUC when labels are in random order.

    √((P + N + 1) / (12 P N) · (1 − Σ (t³ − t) / (n³ − n))) for P positive and N negative of n rows
    and groups of t equal scores (Lehmann, *Nonparametrics*, 1975, appendix 4). It is exact for
    labels that were permuted over rows: given the scores, all their orders are then equally likely,
    even if scores are alike within users, or labels were before.

    Args:
        scores: (n,).
        labels: (n,), 0 or 1.
    """
    positives, rows = int(np.sum(labels)), len(np.asarray(labels))
    _, counts = np.unique(np.asarray(scores), return_counts=True)
    ties = counts.astype(float)
    tied = float((ties**3 - ties).sum()) / max(float(rows) ** 3 - rows, 1.0)
    return chance_error(positives, rows - positives) * math.sqrt(max(0.0, 1.0 - tied))


def chances(rows: Batch, found: Probabilities, tasks: Sequence[str]) -> list[Chance]:
    """Return the AUC of every task of predictions (N, T), sample weights left aside."""
    made = []
    for number, task in enumerate(tasks):
        seen = rows.mask[:, number].numpy()
        labels, scores = rows.labels[:, number].numpy()[seen], found[seen, number]
        value, error = auc(scores, labels).value, permuted_error(scores, labels)
        made.append(Chance(task, value, error, int(labels.sum())))
    return made


def chance_rows(control: str, found: Sequence[Chance], *, group: str) -> list[Row]:
    """Return the largest distance from chance, then the AUC of every task with its interval.

    Args:
        control: Name of the control.
        found: One for each task.
        group: Name of the rows.
    """
    known = [one.distance for one in found if not math.isnan(one.distance)]
    largest = max(known, default=math.nan)
    rows = [Row(control, group, DISTANCE, largest, n=max(len(known), 1))]
    for one in found:
        reach = _NORMAL * one.error
        ends = one.auc - reach, one.auc + reach
        rows.append(Row(control, group, f"auc, {one.task}", one.auc, *ends, one.positives))
    return rows


def chance_bars(
    control: str, found: Sequence[Chance], sense: Literal["<=", ">="] = "<="
) -> list[Bar]:
    """Return a bar per task that has both classes: within 3 standard errors of 0.5, or beyond."""
    return [
        Bar(f"{control}: |AUC − 0.5| of {one.task}", one.distance, sense, LIMIT, "standard errors")
        for one in found
        if not math.isnan(one.distance)
    ]
