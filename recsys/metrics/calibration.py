"""Whether predicted probabilities come true: in total, and bin by bin."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import check_at_least
from recsys.metrics.inputs import Measured, binary_rows, probabilities

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
