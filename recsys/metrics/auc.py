"""The area under the ROC curve, exact."""

import numpy as np
from numpy.typing import ArrayLike

from recsys.metrics.inputs import Measured, binary_rows, missing_class


def auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Measured:
    """Return the probability that a positive row scores above a negative one, ties counting half.

    Exact, by one sort: O(N log N).

    Args:
        scores: (N,).
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Returns:
        The area, NaN with the reason where one of the two classes has no weight.

    Raises:
        GatesError: Lengths differ, a score is NaN, or a label is neither 0 nor 1.
    """
    values, positive, given = binary_rows(scores, labels, weights)
    order = np.argsort(values)
    values, positive, given = values[order], positive[order], given[order]
    negatives = np.where(positive, 0.0, given)
    total = float(given[positive].sum()), float(negatives.sum())
    if reason := missing_class(*total):
        return Measured(float("nan"), reason)
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    starts = np.concatenate(([0], starts))
    tied = np.add.reduceat(negatives, starts)
    own = np.add.reduceat(np.where(positive, given, 0.0), starts)
    wins = own @ (tied.cumsum() - tied / 2)
    return Measured(float(wins / (total[0] * total[1])))
