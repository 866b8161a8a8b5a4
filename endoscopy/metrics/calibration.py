"""Whether probabilities of classes are calibrated."""

import numpy as np
import pandas as pd


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
