"""Scores of confusion matrices (..., K, K), rows true and columns predicted.

All return (...), or (..., K) where they are those of each class. A score that is 0/0 is NaN. Means
over classes take the classes that occur, as scikit-learn does: in truth or prediction for F1 and
precision, in truth for recall.
"""

import numpy as np


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator > 0)


def _hits(matrix: np.ndarray) -> np.ndarray:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def _mean_where(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    return _ratio(np.where(present, values, 0).sum(-1), present.sum(-1))


def _occurs(matrix: np.ndarray) -> np.ndarray:
    return (matrix.sum(-1) + matrix.sum(-2)) > 0


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """Return the accuracy, the fraction of correct classes."""
    return _ratio(_hits(matrix).sum(-1), matrix.sum((-2, -1)))


def sensitivity(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of its samples that are found (recall), (..., K)."""
    return _ratio(_hits(matrix), matrix.sum(-1))


def specificity(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of other samples not assigned to it, (..., K)."""
    others = matrix.sum((-2, -1))[..., None] - matrix.sum(-1)
    return _ratio(others - (matrix.sum(-2) - _hits(matrix)), others)


def positive_predictive_value(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of its calls that are correct (precision), (..., K)."""
    return _ratio(_hits(matrix), matrix.sum(-2))


def negative_predictive_value(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of samples not called it that are not, (..., K)."""
    not_called = matrix.sum((-2, -1))[..., None] - matrix.sum(-2)
    return _ratio(not_called - (matrix.sum(-1) - _hits(matrix)), not_called)


def f1(matrix: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, 2 TP / (2 TP + FP + FN), (..., K)."""
    return _ratio(2 * _hits(matrix), matrix.sum(-1) + matrix.sum(-2))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Return the plain mean of the F1 of classes."""
    return _mean_where(f1(matrix), _occurs(matrix))


def weighted_f1(matrix: np.ndarray) -> np.ndarray:
    """Return the mean of the F1 of classes, weighted by their true samples."""
    support = matrix.sum(-1)
    return _ratio((np.nan_to_num(f1(matrix)) * support).sum(-1), support.sum(-1))


def balanced_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Return the mean sensitivity of classes."""
    return _mean_where(sensitivity(matrix), matrix.sum(-1) > 0)


def quadratic_kappa(matrix: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa with squared distances of classes as weights (Cohen, 1968)."""
    classes = np.arange(matrix.shape[-1])
    cost = (classes[:, None] - classes) ** 2
    chance = matrix.sum(-1)[..., :, None] * matrix.sum(-2)[..., None, :]
    observed = (cost * matrix).sum((-2, -1))
    return 1 - _ratio(observed * matrix.sum((-2, -1)), (cost * chance).sum((-2, -1)))
