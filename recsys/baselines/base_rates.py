"""The base rate of each task for every row."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from recsys.baselines.predictor import rates
from recsys.batch import Batch


class BaseRates:
    """Predict the rate of each task in the training rows."""

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Count."""
        self.rates = rates(rows)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return the rates for every row (N, T)."""
        return np.tile(self.rates, (len(rows), 1))
