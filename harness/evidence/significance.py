"""Probabilities of differences: what many comparisons do to a p."""

import numpy as np
from numpy.typing import ArrayLike


def holm(p: ArrayLike) -> np.ndarray:
    """Correct the p of several comparisons step by step (Holm, 1979).

    Args:
        p: (N,); NaN stays NaN and counts as no comparison.

    Returns:
        Corrected p (N,), in the same order, at most 1.

    Raises:
        ValueError: A p lies outside 0 to 1.
    """
    found = np.asarray(p, dtype=float)
    if ((found < 0) | (found > 1)).any():
        raise ValueError(f"p lies between 0 and 1, found {found.min()} to {found.max()}")
    order = np.argsort(found, kind="stable")[: np.isfinite(found).sum()]  # NaN is sorted last
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(found.shape, np.nan)
    corrected[order] = np.maximum.accumulate(np.minimum(found[order] * factors, 1.0))
    return corrected
