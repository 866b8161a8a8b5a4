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
    """Return the share of right classes."""
    return _ratio(_hits(matrix).sum(-1), matrix.sum((-2, -1)))


def sensitivity(matrix: np.ndarray) -> np.ndarray:
    """Return, of each class, the share of its samples that are found (recall), (..., K)."""
    return _ratio(_hits(matrix), matrix.sum(-1))


def specificity(matrix: np.ndarray) -> np.ndarray:
    """Return, of each class, the share of the other samples that are not called it, (..., K)."""
    others = matrix.sum((-2, -1))[..., None] - matrix.sum(-1)
    return _ratio(others - (matrix.sum(-2) - _hits(matrix)), others)


def positive_predictive_value(matrix: np.ndarray) -> np.ndarray:
    """Return, of each class, the share of its calls that are right (precision), (..., K)."""
    return _ratio(_hits(matrix), matrix.sum(-2))


def negative_predictive_value(matrix: np.ndarray) -> np.ndarray:
    """Return, of each class, the share right among the samples not called it, (..., K)."""
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


def published_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Return the eight numbers of the published evaluation (arXiv 2407.04400) under their names.

    What it calls specificity is the mean precision of classes; it is kept here alone, as
    ``specificity_as_coded``, for comparison with published tables.
    """
    precision = np.nan_to_num(positive_predictive_value(matrix))
    recall = balanced_accuracy(matrix)
    as_coded = _mean_where(precision, _occurs(matrix))
    return {
        "sensitivity": recall,
        "specificity_as_coded": as_coded,
        "balanced_perf": (recall + as_coded) / 2,
        "precision_weighted": _ratio((precision * matrix.sum(-1)).sum(-1), matrix.sum((-2, -1))),
        "recall_weighted": accuracy(matrix),
        "f1_weighted": weighted_f1(matrix),
        "balanced_accuracy": recall,
        "accuracy": accuracy(matrix),
    }
