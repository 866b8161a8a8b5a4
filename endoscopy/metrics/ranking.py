"""How well sizes rank objects, whatever the cut-off."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from endoscopy.metrics.size_classes import TRUTH


def auroc(score: ArrayLike, positive: ArrayLike, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the area under the ROC curve, also of many weighted samples at once.

    It is the probability that a positive sample has the higher score, ties counting half.

    Args:
        score: (N,).
        positive: (N,) boolean.
        weights: (..., N), all one by default.

    Returns:
        (...); NaN where one of the two classes has no weight.

    Raises:
        GatesError: A score is NaN, which has no rank.
        ValueError: The lengths differ.
    """
    score, positive = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool)
    if score.shape != positive.shape or score.ndim != 1:
        raise ValueError(f"score {score.shape} and positive {positive.shape} must have one length")
    unknown = int(np.isnan(score).sum())
    if unknown:
        raise GatesError(f"{unknown} of {score.size} scores are NaN; leave out rows without one")
    if weights is None:
        weights = np.ones(len(score))
    if not score.size:
        return np.full(weights.shape[:-1], np.nan)
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
    gt: ArrayLike, predicted: ArrayLike, cut: Literal[5, 10], weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the AUROC of the predicted size for > 5 mm, or ≥ 10 mm; see auroc."""
    positive = TRUTH.classes(gt) >= (1 if cut == 5 else 2)
    return auroc(predicted, positive, weights)
