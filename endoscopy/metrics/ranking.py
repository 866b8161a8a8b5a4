"""How well sizes rank objects, whatever the cut-off."""

from typing import Literal

import numpy as np

from endoscopy.metrics.size_classes import TRUTH


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the area under the ROC curve, also of many weighted samples at once.

    It is the probability that a positive sample has the higher score, ties counting half.

    Args:
        score: (N,).
        positive: (N,) boolean.
        weights: (..., N), all one by default.

    Returns:
        (...); NaN where one of the two classes has no weight.
    """
    if weights is None:
        weights = np.ones(len(score))
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    ranked, is_positive = weights[..., order], positive[order].astype(float)
    positives = np.add.reduceat(ranked * is_positive, starts, axis=-1)
    negatives = np.add.reduceat(ranked * (1 - is_positive), starts, axis=-1)
    below = negatives.cumsum(-1) - negatives / 2
    pairs = positives.sum(-1) * negatives.sum(-1)
    wins = (positives * below).sum(-1)
    return np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def size_auroc(
    gt: np.ndarray, predicted: np.ndarray, cut: Literal[5, 10], weights: np.ndarray | None = None
) -> np.ndarray:
    """Return how well the predicted size tells > 5 mm, or ≥ 10 mm, from the rest; see auroc."""
    positive = TRUTH.classes(gt) >= (1 if cut == 5 else 2)
    return auroc(np.asarray(predicted, dtype=float), positive, weights)
