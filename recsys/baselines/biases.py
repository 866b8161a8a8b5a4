"""A logistic regression on one-hot columns: a bias of each user, item or other value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from core_gates.errors import check_positive
from recsys.baselines.predictor import rates
from recsys.batch import Batch

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression


class Biases:
    """Predict σ(bias + Σ_columns bias of the value), one logistic regression for each task.

    Args:
        columns: Places of the columns among the sparse inputs.
        sizes: Rows of their tables.
        penalty: Weight of the squared biases, in rows.

    Raises:
        ValueError: The penalty is not positive.
    """

    def __init__(
        self, columns: Sequence[int], sizes: Sequence[int], *, penalty: float = 1.0
    ) -> None:
        check_positive(penalty=penalty)
        self.columns, self.sizes, self.penalty = tuple(columns), tuple(sizes), penalty

    def fit(self, rows: Batch, validation: Batch) -> Self:  # noqa: ARG002
        """Fit each task to the rows where it counts."""
        from sklearn.linear_model import LogisticRegression  # takes a second

        inputs, self.rates = self._one_hot(rows), rates(rows)
        self.models: list[LogisticRegression | None] = []
        for task in range(rows.labels.shape[1]):
            counts = rows.mask[:, task].numpy()
            labels = rows.labels[:, task].numpy()[counts]
            model = None
            if 0 < labels.sum() < len(labels):
                model = LogisticRegression(C=1 / self.penalty, max_iter=300)
                model.fit(inputs[counts], labels, sample_weight=rows.weight.numpy()[counts])
            self.models.append(model)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        inputs, found = self._one_hot(rows), np.tile(self.rates, (len(rows), 1))
        for task, model in enumerate(self.models):
            if model is not None:
                found[:, task] = model.predict_proba(inputs)[:, 1]
        return found

    def _one_hot(self, rows: Batch) -> sparse.csr_matrix:
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        places = rows.sparse[:, list(self.columns)].numpy() + starts[:-1]
        count, width = places.shape
        bounds = np.arange(count + 1) * width
        ones = np.ones(count * width)
        return sparse.csr_matrix((ones, places.ravel(), bounds), shape=(count, starts[-1]))
