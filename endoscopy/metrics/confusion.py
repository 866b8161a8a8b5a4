"""Confusion matrices, also of many weighted samples at once."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike


def confusion_matrix(
    truth: ArrayLike,
    predicted: ArrayLike,
    *,
    num_classes: int = 3,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Sum the weight of each pair of classes.

    Args:
        truth: (N,) true classes, 0 to ``num_classes - 1``.
        predicted: (N,) predicted classes.
        num_classes: Number K of classes.
        weights: (..., N), for example how often each resample of a bootstrap draws each sample;
            all one by default.

    Returns:
        (..., K, K), float, rows true and columns predicted.

    Raises:
        ValueError: The lengths differ or a class is out of range.
    """
    truth, predicted = (_classes(values) for values in (truth, predicted))
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(
            f"truth {truth.shape} and predicted {predicted.shape} must have one length"
        )
    for name, classes in (("truth", truth), ("predicted", predicted)):
        if classes.size and not 0 <= classes.min() <= classes.max() < num_classes:
            raise ValueError(f"{name} has classes {classes.min()} to {classes.max()}, expected"
                             f" 0 to {num_classes - 1}")  # fmt: skip
    if weights is None:
        weights = np.ones(len(truth))
    pairs = np.eye(num_classes**2)[truth * num_classes + predicted]
    return (weights @ pairs).reshape(*weights.shape[:-1], num_classes, num_classes)


def _classes(values: ArrayLike) -> np.ndarray:
    """Return classes as integers, also of an empty list, which has no dtype."""
    array = np.asarray(values)
    return array if array.size else array.astype(np.int64)


def at_cut_off(matrix: np.ndarray, cut: Literal[5, 10]) -> np.ndarray:
    """Merge the three size classes (..., 3, 3) into two (..., 2, 2), the larger sizes positive."""
    groups = np.array([[1, 0], [0, 1], [0, 1]] if cut == 5 else [[1, 0], [1, 0], [0, 1]])
    return groups.T @ matrix @ groups
