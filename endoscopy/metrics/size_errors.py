"""Errors of sizes in millimeters, of many weighted samples at once, and how sizes rank objects."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from endoscopy.metrics.classification import TRUTH, ratio

NORMAL_95 = 1.959963984540054


class LimitsOfAgreement(NamedTuple):
    """Bland-Altman limits (Bland and Altman, 1986), scalars or (...) of weights (..., N).

    Attributes:
        bias: Mean error, mm; or the mean ratio.
        low: Bias - 1.96 standard deviations of the error, mm; or the lower ratio.
        high: Bias + 1.96 standard deviations, mm; or the upper ratio.
    """

    bias: np.ndarray
    low: np.ndarray
    high: np.ndarray


def weighted_mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of values (N,) under weights (..., N); NaN without weight."""
    if weights is None:
        weights = np.ones(len(values))
    return ratio(weights @ values, weights.sum(-1))


def mean_absolute_error(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean of |predicted - gt|, mm."""
    return weighted_mean(np.abs(_errors(gt, predicted)), weights)


def root_mean_square_error(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the root of the mean square error, mm."""
    return np.sqrt(weighted_mean(_errors(gt, predicted) ** 2, weights))


def mean_relative_error(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean of |predicted - gt| / gt, known as MAPE; a ratio, not a percentage."""
    return weighted_mean(np.abs(_errors(gt, predicted)) / np.asarray(gt, dtype=float), weights)


def bias(gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of predicted - gt, mm; positive where sizes are overestimated."""
    return weighted_mean(_errors(gt, predicted), weights)


def limits_of_agreement(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> LimitsOfAgreement:
    """Return the bias and the limits that hold 95 % of normally distributed errors.

    Args:
        gt: (N,) true sizes, mm.
        predicted: (N,), mm.
        weights: (..., N) counts; all one by default.
    """
    error = _errors(gt, predicted)
    if weights is None:
        weights = np.ones(len(error))
    mean, total = weighted_mean(error, weights), weights.sum(-1)
    square = np.maximum(weighted_mean(error**2, weights) - mean**2, 0)
    half = NORMAL_95 * np.sqrt(square * ratio(total, total - 1))
    return LimitsOfAgreement(mean, mean - half, mean + half)


def ratio_limits(
    gt: ArrayLike, predicted: ArrayLike, weights: np.ndarray | None = None
) -> LimitsOfAgreement:
    """Return limits of the ratio of predicted to true size, for errors that grow with the size.

    Those of the logarithms, exponentiated (Bland and Altman, 1999, section 3.1): 95 %
    of the ratios lie between, if they are distributed log-normally. The bias is the geometric mean.

    Args:
        gt: (N,) true sizes, mm.
        predicted: (N,), mm.
        weights: (..., N) counts; all one by default.
    """
    log_gt, log_predicted = (np.log(np.asarray(one, dtype=float)) for one in (gt, predicted))
    return LimitsOfAgreement(*map(np.exp, limits_of_agreement(log_gt, log_predicted, weights)))


def _errors(gt: ArrayLike, predicted: ArrayLike) -> np.ndarray:
    """Return predicted minus true sizes (N,), float64."""
    return np.asarray(predicted, dtype=float) - np.asarray(gt, dtype=float)


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
    if unknown := int(np.isnan(score).sum()):
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
    return ratio((positives * below).sum(-1), positives.sum(-1) * negatives.sum(-1))


def size_auroc(
    gt: ArrayLike, predicted: ArrayLike, cut: Literal[5, 10], weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the AUROC of the predicted size for > 5 mm, or ≥ 10 mm; see auroc."""
    positive = TRUTH.classes(gt) >= (1 if cut == 5 else 2)
    return auroc(predicted, positive, weights)
