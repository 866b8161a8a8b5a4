"""Gradient-boosted trees on the same columns, one ensemble for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import check_at_least, check_positive
from recsys.baselines.predictor import rates
from recsys.batch import Batch

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingClassifier

CATEGORIES = 255  # that the histograms of the trees can hold


class Trees:
    """Boosted trees of scikit-learn on sparse columns, as categories, and dense columns.

    A column with more values than a histogram holds is given as numbers, in order of frequency.

    Args:
        sparse: Places of the columns among the sparse inputs; all if None.
        learning_rate: Shrinkage.
        max_leaf_nodes: Leaves of a tree.
        max_iter: Trees at most; fewer where the validation loss no longer improves.
        l2: Penalty of leaves.
        seed: Of the features that the bins are drawn from.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        sparse: Sequence[int] | None = None,
        *,
        learning_rate: float = 0.05,
        max_leaf_nodes: int = 31,
        max_iter: int = 1000,
        l2: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_positive(learning_rate=learning_rate)
        check_at_least(1, max_iter=max_iter)
        check_at_least(2, max_leaf_nodes=max_leaf_nodes)
        check_at_least(0, l2=l2, seed=seed)
        self.sparse = None if sparse is None else tuple(sparse)
        self.options: dict[str, Any] = {
            "learning_rate": learning_rate, "max_leaf_nodes": max_leaf_nodes,
            "max_iter": max_iter, "l2_regularization": l2, "random_state": seed,
            "early_stopping": True, "n_iter_no_change": 15,
        }  # fmt: skip

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Fit each task to the rows where it counts; validation rows stop it.

        Where a task counts in none of them, a tenth of its training rows stops it instead.
        """
        from sklearn.ensemble import HistGradientBoostingClassifier  # takes a second

        inputs, held, self.rates = self._inputs(rows), self._inputs(validation), rates(rows)
        categories = [
            c for c in range(self._width(rows)) if inputs[:, c].max(initial=0) < CATEGORIES
        ]
        self.models: list[HistGradientBoostingClassifier | None] = []
        for task in range(rows.labels.shape[1]):
            counts, seen = rows.mask[:, task].numpy(), validation.mask[:, task].numpy()
            labels = rows.labels[:, task].numpy()[counts]
            model = None
            if min(labels.sum(), len(labels) - labels.sum()) >= 10:
                model = HistGradientBoostingClassifier(
                    categorical_features=categories or None, **self.options
                )
                stopping: dict[str, Any] = {}
                if seen.any():
                    stopping = {
                        "X_val": held[seen],
                        "y_val": validation.labels[:, task].numpy()[seen],
                        "sample_weight_val": validation.weight.numpy()[seen],
                    }
                weight = rows.weight.numpy()[counts]
                model.fit(inputs[counts], labels, sample_weight=weight, **stopping)
            self.models.append(model)
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        inputs, found = self._inputs(rows), np.tile(self.rates, (len(rows), 1))
        for task, model in enumerate(self.models):
            if model is not None:
                found[:, task] = model.predict_proba(inputs)[:, 1]
        return found

    def _width(self, rows: Batch) -> int:
        return rows.sparse.shape[1] if self.sparse is None else len(self.sparse)

    def _inputs(self, rows: Batch) -> NDArray[np.float64]:
        sparse = rows.sparse if self.sparse is None else rows.sparse[:, list(self.sparse)]
        inputs: NDArray[np.float64] = np.concatenate([sparse.numpy(), rows.dense.numpy()], 1)
        return inputs
