"""The rates of all tasks as a function of a single column."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from recsys.baselines.predictor import rates
from recsys.batch import Batch


class OneColumn:
    """Predict the rate of each task among training rows with a similar value of one column.

    Rates are those of quantile bins, shrunk towards the rate of all rows.

    Args:
        column: Place of the column among the dense inputs.
        bins: Number of quantile bins.
        prior: Rows with the overall rate that are added to each bin.
    """

    def __init__(self, column: int, *, bins: int = 50, prior: float = 20.0) -> None:
        self.column, self.bins, self.prior = column, bins, prior

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Count in bins."""
        values = rows.dense[:, self.column].double().numpy()
        self.edges = np.unique(np.quantile(values, np.linspace(0, 1, self.bins + 1)[1:-1]))
        bins = np.searchsorted(self.edges, values, side="right")
        weight = rows.weight.double().unsqueeze(1).numpy() * rows.mask.numpy()
        positives = weight * rows.labels.double().numpy()
        shape = (len(self.edges) + 1, weight.shape[1])
        counts, sums = np.zeros(shape), np.zeros(shape)
        np.add.at(counts, bins, weight)
        np.add.at(sums, bins, positives)
        self.table = (sums + self.prior * rates(rows)) / (counts + self.prior)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return the rates of the bins of the rows (N, T)."""
        values = rows.dense[:, self.column].double().numpy()
        found: NDArray[np.float64] = self.table[np.searchsorted(self.edges, values, side="right")]
        return found
