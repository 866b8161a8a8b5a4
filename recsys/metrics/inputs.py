"""What metrics are given: one row per impression, checked once."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError


class Measured(NamedTuple):
    """A figure, or the reason why there is none.

    Attributes:
        value: The figure; NaN where it is not defined.
        reason: Why it is not defined, for example ``no positive row``; else empty.
    """

    value: float
    reason: str = ""


def binary_rows(
    scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores (float64), labels (bool) and weights (float64), each (N,).

    Args:
        scores: (N,), larger for likelier positives.
        labels: (N,), 0 or 1.
        weights: (N,) sample weights; 1 by default.

    Raises:
        GatesError: Lengths differ, a score is NaN, a label is neither 0 nor 1, or a weight is
            negative or not finite.
    """
    values, truth = _column("scores", scores), np.asarray(labels)
    given = np.ones(len(values)) if weights is None else _column("weights", weights)
    if not values.shape == truth.shape == given.shape:
        raise GatesError(
            f"scores {values.shape}, labels {truth.shape} and weights {given.shape} must have one "
            "length"
        )
    if unknown := int(np.isnan(values).sum()):
        raise GatesError(f"{unknown} of {values.size} scores are NaN; leave out rows without one")
    if truth.dtype != bool:
        positive = truth == 1
        if wrong := int((~positive & (truth != 0)).sum()):
            raise GatesError(
                f"{wrong} of {truth.size} labels are neither 0 nor 1; mask rows without a label"
            )
        truth = positive
    if not (np.isfinite(given) & (given >= 0)).all():
        raise GatesError("weights must be finite and not negative")
    return values, truth, given


def probabilities(probs: np.ndarray) -> np.ndarray:
    """Return the probabilities, if they are.

    Raises:
        GatesError: One lies outside of [0, 1].
    """
    if probs.size and not (probs.min() >= 0 and probs.max() <= 1):
        raise GatesError(
            f"probabilities lie in [0, 1], found {probs.min():.4g} to {probs.max():.4g}; apply the "
            "sigmoid to logits first"
        )
    return probs


def missing_class(positive: float, negative: float) -> str:
    """Return why a ranking of two classes is not defined; empty where it is.

    Args:
        positive: Weight of the positive rows.
        negative: Weight of the negative rows.
    """
    if positive > 0 and negative > 0:
        return ""
    if positive == negative == 0:
        return "no row"
    return "no positive row" if positive == 0 else "no negative row"


def _column(name: str, values: ArrayLike) -> np.ndarray:
    column = np.asarray(values, dtype=float)
    if column.ndim != 1:
        raise GatesError(f"{name} have shape {column.shape}, expected one per row (N,)")
    return column
