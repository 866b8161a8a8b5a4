"""The rate of each task as a function of a single column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import check_at_least, check_positive
from recsys.baselines.predictor import rates
from recsys.batch import Batch


class OneColumn:
    """Predict the rate of each task among training rows with a similar value of one column.

    Rates are those of quantile bins, shrunk towards the rate of all rows.

    Args:
        column: Place of the column among the dense inputs; or a place for each task.
        bins: Number of quantile bins.
        prior: Rows with the overall rate that are added to each bin.

    Raises:
        ValueError: There is no bin, or the prior is not positive.
    """

    def __init__(self, column: int | Sequence[int], *, bins: int = 50, prior: float = 20.0) -> None:
        check_at_least(1, bins=bins)
        check_positive(prior=prior)
        self.column = column if isinstance(column, int) else tuple(column)
        self.bins, self.prior = bins, prior

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Count in bins.

        Raises:
            ValueError: There is not one column for each task.
        """
        weight = rows.weight.double().unsqueeze(1).numpy() * rows.mask.numpy()
        positives = weight * rows.labels.double().numpy()
        columns, base = self._columns(rows), rates(rows)
        steps = np.linspace(0, 1, self.bins + 1)[1:-1]
        self.edges, self.tables = [], []
        for task, values in enumerate(columns):
            edges = np.unique(np.quantile(values, steps))
            bins = np.searchsorted(edges, values, side="right")
            counts = np.bincount(bins, weight[:, task], len(edges) + 1)
            sums = np.bincount(bins, positives[:, task], len(edges) + 1)
            self.edges.append(edges)
            self.tables.append((sums + self.prior * base[task]) / (counts + self.prior))
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return the rates of the bins of the rows (N, T)."""
        found = [
            table[np.searchsorted(edges, values, side="right")]
            for edges, table, values in zip(
                self.edges, self.tables, self._columns(rows), strict=True
            )
        ]
        return np.stack(found, 1)

    def _columns(self, rows: Batch) -> list[NDArray[np.float64]]:
        """Return the values (N,) that each task goes by."""
        tasks = rows.labels.shape[1]
        places = (self.column,) * tasks if isinstance(self.column, int) else self.column
        if len(places) != tasks:
            raise ValueError(f"{len(places)} columns for {tasks} tasks, expected one for each")
        return [rows.dense[:, place].double().numpy() for place in places]
