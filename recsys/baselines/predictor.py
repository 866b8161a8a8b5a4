"""What every baseline is: fitted to the training rows, then asked for probabilities."""

from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from recsys.batch import Batch


class Predictor(Protocol):
    """A baseline: it sees the encoded rows that networks see, and nothing else."""

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Learn from training rows; a task without both labels there is predicted by its rate.

        Args:
            rows: Training rows.
            validation: Rows by which training may stop, as it does for networks.
        """

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""


def rates(rows: Batch) -> NDArray[np.float64]:
    """Return the weighted rate (T,) of each task where it counts, away from 0 and 1.

    One half of a positive and of a negative row is added, so that a logarithm exists.
    """
    weight = rows.weight.double().unsqueeze(1) * rows.mask
    positives = (weight * rows.labels).sum(0) + 0.5
    return (positives / (weight.sum(0) + 1)).numpy()
