"""Probabilities of differences: a test of signs, and what many comparisons do to a p."""

import math

import numpy as np
from numpy.typing import ArrayLike


def sign_test(differences: ArrayLike) -> float:
    """Return the exact two-sided p of as many differences of one sign, were both equally likely.

    Args:
        differences: (N,) of independent units; zeros tell nothing and are left out.

    Returns:
        p, at least 2^(1 - N); 1 without a difference.

    Raises:
        ValueError: A difference is NaN.
    """
    signs = np.sign(np.asarray(differences, dtype=float).ravel())
    if np.isnan(signs).any():
        raise ValueError("differences hold NaN; leave out units without a difference")
    positive, negative = int((signs > 0).sum()), int((signs < 0).sum())
    count = positive + negative
    as_extreme = sum(math.comb(count, k) for k in range(min(positive, negative) + 1))
    return min(1.0, as_extreme / 2 ** (count - 1)) if count else 1.0


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
