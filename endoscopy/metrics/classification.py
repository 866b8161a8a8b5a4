"""Clinical size classes, confusion matrices of many weighted samples, their scores, calibration.

Confusion matrices are (..., K, K), rows true and columns predicted.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from core_gates.errors import GatesError

CLASS_NAMES = ("diminutive", "small", "large")


@dataclass(frozen=True)
class CutOffs:
    """Divide sizes into diminutive (at most ``small``), small, and large (at least ``large``).

    Args:
        small: Largest diminutive size, mm.
        large: Smallest large size, mm.

    Raises:
        ValueError: The cut-offs are not positive and ascending.
    """

    small: float
    large: float

    def __post_init__(self) -> None:
        if not 0 < self.small < self.large < np.inf:
            raise ValueError(
                f"cut-offs must be positive and ascending, got {self.small:g} and {self.large:g} mm"
            )

    def classes(self, mm: ArrayLike) -> np.ndarray:
        """Return the class of each size: 0 diminutive, 1 small, 2 large.

        Args:
            mm: Sizes of any shape.

        Returns:
            int64 of the same shape.

        Raises:
            GatesError: A size is not a number.
        """
        mm = np.asarray(mm, dtype=float)
        if unknown := int(np.isnan(mm).sum()):
            raise GatesError(f"{unknown} of {mm.size} sizes are NaN; leave out rows without a size")
        return (mm > self.small).astype(np.int64) + (mm >= self.large)

    def __str__(self) -> str:
        return f"{self.small:g}/{self.large:g} mm"


TRUTH = CutOffs(5, 10)
"""Cut-offs of true sizes, whatever those of the predictions."""

CONTINUOUS = CutOffs(5, 10)
"""Cut-offs of predictions where true sizes are continuous, as those of the renderer."""

PUBLISHED = CutOffs(4.75, 10)
"""Cut-offs of predictions in the published evaluation of arXiv 2407.04400."""


def count_on_cut_offs(gt: ArrayLike, cut_offs: CutOffs = TRUTH) -> dict[float, int]:
    """Count the objects whose true size lies exactly on a cut-off, where noise decides the class.

    Args:
        gt: True sizes, mm.
        cut_offs: Those of the truth.

    Returns:
        Cut-off in mm -> number of objects.
    """
    gt = np.asarray(gt, dtype=float)
    return {cut: int((gt == cut).sum()) for cut in (cut_offs.small, cut_offs.large)}


def has_known_class(gt: ArrayLike, censored: ArrayLike, cut_offs: CutOffs = TRUTH) -> np.ndarray:
    """Return where the class is certain: that of a lower bound is only if it is large already."""
    return ~np.asarray(censored, dtype=bool) | (cut_offs.classes(gt) == len(CLASS_NAMES) - 1)


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


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return numerator over denominator, NaN where the denominator is not positive."""
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator > 0)


def _hits(matrix: np.ndarray) -> np.ndarray:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def _mean_where(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    return ratio(np.where(present, values, 0).sum(-1), present.sum(-1))


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """Return the accuracy, the fraction of correct classes."""
    return ratio(_hits(matrix).sum(-1), matrix.sum((-2, -1)))


def sensitivity(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of its samples that are found (recall), (..., K)."""
    return ratio(_hits(matrix), matrix.sum(-1))


def specificity(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of other samples not assigned to it, (..., K)."""
    others = matrix.sum((-2, -1))[..., None] - matrix.sum(-1)
    return ratio(others - (matrix.sum(-2) - _hits(matrix)), others)


def positive_predictive_value(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of its calls that are correct (precision), (..., K)."""
    return ratio(_hits(matrix), matrix.sum(-2))


def negative_predictive_value(matrix: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of samples not called it that are not, (..., K)."""
    not_called = matrix.sum((-2, -1))[..., None] - matrix.sum(-2)
    return ratio(not_called - (matrix.sum(-1) - _hits(matrix)), not_called)


def f1(matrix: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, 2 TP / (2 TP + FP + FN), (..., K)."""
    return ratio(2 * _hits(matrix), matrix.sum(-1) + matrix.sum(-2))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Return the plain mean of the F1 of classes."""
    return _mean_where(f1(matrix), matrix.sum(-1) + matrix.sum(-2) > 0)


def weighted_f1(matrix: np.ndarray) -> np.ndarray:
    """Return the mean of the F1 of classes, weighted by their true samples."""
    support = matrix.sum(-1)
    return ratio((np.nan_to_num(f1(matrix)) * support).sum(-1), support.sum(-1))


def balanced_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Return the mean sensitivity of classes."""
    return _mean_where(sensitivity(matrix), matrix.sum(-1) > 0)


def quadratic_kappa(matrix: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa with squared distances of classes as weights (Cohen, 1968)."""
    classes = np.arange(matrix.shape[-1])
    cost = (classes[:, None] - classes) ** 2
    chance = matrix.sum(-1)[..., :, None] * matrix.sum(-2)[..., None, :]
    observed = (cost * matrix).sum((-2, -1))
    return 1 - ratio(observed * matrix.sum((-2, -1)), (cost * chance).sum((-2, -1)))


def expected_calibration_error(
    probabilities: np.ndarray,
    truth: np.ndarray,
    *,
    num_bins: int = 10,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mean gap between confidence and accuracy of the top class (Guo et al., 2017).

    Args:
        probabilities: (N, K), rows summing to one.
        truth: (N,) true classes.
        num_bins: Equally wide bins of the confidence.
        weights: (..., N), all one by default.

    Returns:
        (...).

    Raises:
        ValueError: Rows are not distributions.
    """
    confidence, right, index = _binned(probabilities, truth, num_bins)
    if weights is None:
        weights = np.ones(len(truth))
    gaps = (weights * (right - confidence)) @ np.eye(num_bins)[index]
    return np.abs(gaps).sum(-1) / weights.sum(-1)


def reliability(
    probabilities: np.ndarray, truth: np.ndarray, *, num_bins: int = 10
) -> pd.DataFrame:
    """Tabulate confidence against accuracy of the top class, one row per nonempty bin.

    Args:
        probabilities: (N, K).
        truth: (N,) true classes.
        num_bins: Equally wide bins of the confidence.

    Returns:
        Columns low, high, count, confidence, accuracy.

    Raises:
        ValueError: Rows are not distributions.
    """
    confidence, right, index = _binned(probabilities, truth, num_bins)
    frame = pd.DataFrame({"bin": index, "confidence": confidence, "accuracy": right})
    table = frame.groupby("bin").agg(
        count=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    low = table.index.to_numpy() / num_bins
    table.insert(0, "low", low)
    table.insert(1, "high", low + 1 / num_bins)
    return table.reset_index(drop=True)


def _binned(
    probabilities: np.ndarray, truth: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return confidence, whether the top class is right, and the bin of each sample."""
    if probabilities.ndim != 2 or not np.allclose(probabilities.sum(1), 1, atol=1e-4):
        raise ValueError(
            f"probabilities {probabilities.shape} must be (N, K) with rows that sum to one"
        )
    confidence = probabilities.max(1)
    right = (probabilities.argmax(1) == truth).astype(float)
    index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    return confidence, right, index
