"""Log-loss, and log-loss relative to the base rate."""

import numpy as np
from numpy.typing import ArrayLike

from recsys.metrics.inputs import Measured, binary_rows, missing_class, probabilities

EPS = 1e-7
"""Probabilities are clipped to [EPS, 1 − EPS], the resolution of float32 near 1."""


def log_loss(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Measured:
    """Return the mean of −log p(label), in nats.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    values, positive, given = binary_rows(probs, labels, weights)
    if not given.sum() > 0:
        return Measured(float("nan"), "no row")
    return Measured(float(losses(probabilities(values), positive) @ given / given.sum()))


def normalized_entropy(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> Measured:
    """Return the log-loss over that of the constant base rate: 1 is no better than the mean.

    He et al., *Practical lessons from predicting clicks on ads at Facebook*, 2014.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    _, positive, given = binary_rows(probs, labels, weights)
    mass = float(given[positive].sum()), float(given[~positive].sum())
    if reason := missing_class(*mass):
        return Measured(float("nan"), reason)
    rate = mass[0] / sum(mass)
    return Measured(log_loss(probs, labels, weights).value / float(entropy(rate)))


def losses(probs: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return −log p(label) of every row, in nats; see :data:`EPS`.

    Args:
        probs: (...).
        positive: (...) boolean.
    """
    return -np.log(np.clip(np.where(positive, probs, 1 - probs), EPS, 1 - EPS))


def entropy(rate: ArrayLike) -> np.ndarray:
    """Return the entropy of a base rate, in nats; 0 at 0 and 1."""
    known = np.asarray(rate, dtype=float)
    certain = (known == 0) | (known == 1)
    inner = np.where(certain, 0.5, known)
    found = -inner * np.log(inner) - (1 - inner) * np.log1p(-inner)
    return np.where(certain, 0.0, found)
