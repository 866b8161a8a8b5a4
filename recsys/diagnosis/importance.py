"""What a fitted model loses if a field tells it nothing: permutation importance."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_at_least
from harness.evidence import Difference, Resamples
from recsys.metrics.resampled import summed_log_loss, user_resamples

Score = Callable[[pl.DataFrame], np.ndarray]
"""Table of N rows -> probabilities (N, T)."""


class Importance(NamedTuple):
    """What the log-loss gains when a field is permuted over the rows.

    Attributes:
        field: Its name.
        total: Of the sum over tasks, with an interval over users and permutations.
        tasks: Of each task, by name.
    """

    field: str
    total: Difference
    tasks: dict[str, Difference]


def permutation_importance(
    score: Score,
    table: pl.DataFrame,
    fields: Sequence[str] | Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    labels: ArrayLike,
    users: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    repeats: int = 3,
    draws: Resamples | None = None,
    seed: int = 0,
) -> list[Importance]:
    """Return the importance of every field, the largest first (Breiman, 2001; Fisher et al., 2019).

    Values are moved between rows of the table, so that crossed features and histories made of it
    change, too. A field whose information other fields repeat looks unimportant: permute such
    fields together.

    Args:
        score: Of the model, raw rows to probabilities.
        table: N rows that were not trained on.
        fields: Columns; or name of a group to its columns, which are permuted together.
        tasks: T names.
        labels: (N, T), 0 or 1; anything where masked.
        users: (N,) user of each row.
        mask: (N, T) true where a task counts; everywhere by default.
        weights: (N,) sample weights; 1 by default.
        repeats: Permutations of each field.
        draws: Resamples of users; 1,000 by default.
        seed: Of the permutations.

    Raises:
        GatesError: The table lacks a column, or shapes differ.
        ValueError: ``repeats`` is below 1.
    """
    check_at_least(1, repeats=repeats)
    groups = dict(fields) if isinstance(fields, Mapping) else {name: (name,) for name in fields}
    if missing := sorted({c for g in groups.values() for c in g} - set(table.columns)):
        raise GatesError(
            f"the table lacks {', '.join(missing)}; its columns are {', '.join(table.columns)}"
        )
    draws = draws or user_resamples(users)
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(table)) for _ in range(repeats)]

    def losses(of: pl.DataFrame) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
        return summed_log_loss(labels, score(of), users, mask=mask, weights=weights, tasks=tasks)

    plain, found = losses(table), []
    for name, columns in groups.items():
        moved = [table.with_columns(table[c].gather(order) for c in columns) for order in orders]
        gaps = draws.differences([losses(one) for one in moved], plain)
        found.append(Importance(name, gaps.pop("log_loss"), gaps))
    return sorted(found, key=lambda one: -one.total.value)
