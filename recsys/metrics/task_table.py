"""All figures of every task, as one table."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from recsys.metrics.auc import auc
from recsys.metrics.calibration import expected_calibration_error, predicted_over_observed
from recsys.metrics.grouped_auc import gauc
from recsys.metrics.log_loss import log_loss, normalized_entropy

FEW = 200
"""Tasks with fewer positive test rows are marked: their figures say little."""


def task_table(
    tasks: Sequence[str],
    labels: ArrayLike,
    probs: ArrayLike,
    users: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> pl.DataFrame:
    """Return one row per task.

    Args:
        tasks: T names.
        labels: (N, T), 0 or 1; anything where masked.
        probs: (N, T) predicted probabilities.
        users: (N,) user of each row.
        mask: (N, T) true where a task counts; everywhere by default.
        weights: (N,) sample weights; 1 by default.

    Returns:
        Columns ``task``, ``rows``, ``positives``, ``few`` (fewer than 200 positives), ``auc``,
        ``gauc`` (weighted by rows), ``gauc_mean`` (over users), ``users`` and ``excluded`` of
        both, ``log_loss``, ``ne``, ``ece``, ``pcoc``, and ``note``: why a figure is missing. A
        figure that is not defined is null.

    Raises:
        GatesError: Shapes differ, or a label or probability is none.
    """
    truth, guess, owner = np.asarray(labels), np.asarray(probs, dtype=float), np.asarray(users)
    counted = np.ones(truth.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    wanted = (len(owner), len(tasks))
    if not truth.shape == guess.shape == counted.shape == wanted:
        raise GatesError(
            f"labels {truth.shape}, probs {guess.shape} and mask {counted.shape} must be {wanted}: "
            "rows and tasks"
        )
    given = np.ones(len(owner)) if weights is None else np.asarray(weights, dtype=float)
    rows = [
        _row(task, guess[kept, t], truth[kept, t], owner[kept], given[kept])
        for t, (task, kept) in enumerate(zip(tasks, counted.T, strict=True))
    ]
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(
        pl.col(pl.Float64).fill_nan(None)
    )


def _row(
    task: str, probs: np.ndarray, labels: np.ndarray, users: np.ndarray, weights: np.ndarray
) -> dict[str, str | int | float | bool]:
    area, groups = auc(probs, labels, weights), gauc(probs, labels, users, weights)
    others = {
        "log_loss": log_loss(probs, labels, weights),
        "ne": normalized_entropy(probs, labels, weights),
        "ece": expected_calibration_error(probs, labels, weights),
        "pcoc": predicted_over_observed(probs, labels, weights),
    }
    positives = int((labels == 1).sum())
    return {
        "task": task,
        "rows": len(labels),
        "positives": positives,
        "few": positives < FEW,
        "auc": area.value,
        "gauc": groups.weighted,
        "gauc_mean": groups.mean,
        "users": groups.users,
        "excluded": groups.excluded,
        **{name: found.value for name, found in others.items()},
        "note": area.reason or groups.reason,
    }
