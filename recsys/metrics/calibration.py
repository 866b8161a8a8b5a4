"""Log-loss, also relative to the base rate, and whether predicted probabilities come true."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import check_at_least
from recsys.metrics.areas import Measured, binary_rows, missing_class, probabilities

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


BINS = 20


class Reliability(NamedTuple):
    """Rows in bins of about equal weight, from the smallest to the largest probability.

    Attributes:
        predicted: (B,) mean probability of each bin.
        observed: (B,) fraction of positives.
        counts: (B,) rows, or their weight; bins without are left out.
    """

    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray


def reliability(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, bins: int = BINS
) -> Reliability:
    """Return mean probabilities and frequencies in bins of equal mass.

    Rows of one probability share a bin, so that the order of rows does not matter.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.
        bins: Number of bins; fewer where many probabilities are equal.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
        ValueError: There is no bin.
    """
    check_at_least(1, bins=bins)
    values, positive, given = binary_rows(probs, labels, weights)
    unique, index = np.unique(probabilities(values), return_inverse=True)
    mass = np.bincount(index, given, len(unique))
    total = mass.sum()
    if not total > 0:
        return Reliability(np.zeros(0), np.zeros(0), np.zeros(0))
    middle = (mass.cumsum() - mass / 2) / total
    place = np.minimum((middle * bins).astype(np.intp), bins - 1)[index]
    counts = np.bincount(place, given, bins)
    filled = counts > 0
    counts = counts[filled]
    predicted = np.bincount(place, given * values, bins)[filled] / counts
    observed = np.bincount(place, given * positive, bins)[filled] / counts
    return Reliability(predicted, observed, counts)


def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, *, bins: int = BINS
) -> Measured:
    """Return the mean gap between predicted and observed frequency, over bins of equal mass.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.
        bins: Number of bins.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    found = reliability(probs, labels, weights, bins=bins)
    if not len(found.counts):
        return Measured(float("nan"), "no row")
    gaps = np.abs(found.predicted - found.observed)
    return Measured(float(gaps @ found.counts / found.counts.sum()))


def predicted_over_observed(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> Measured:
    """Return PCOC = Σ p / Σ y: above 1 where probabilities are too high on average.

    Args:
        probs: (N,) predicted probabilities.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, or a probability or label is none.
    """
    values, positive, given = binary_rows(probs, labels, weights)
    observed = float(given[positive].sum())
    if observed == 0:
        return Measured(float("nan"), "no positive row" if given.sum() > 0 else "no row")
    return Measured(float(probabilities(values) @ given / observed))
