"""What a user does with a video: the true probabilities, and one outcome drawn from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from video_multitask.labels import WATCH_RULES, smallest_play_ms
from video_multitask.simulator.settings import (
    INTERACTIONS,
    INTEREST_NOISE,
    PLAY_OFFSET,
    PLAY_SLOPE,
    SLOPES,
    TASKS,
)

Floats = NDArray[np.floating]
NODES = 32
SMALLEST = np.float32(2.0**-24)
_AT_ONCE = 2**12


class Expected(NamedTuple):
    """What is known before the noise is drawn.

    Attributes:
        interest: Mean of the interest w (n,).
        logits: Of the nine interactions at an interest of 0, intercepts included (n, 9).
        slopes: Change of the logits per unit of interest (9,).
        duration_ms: Milliseconds (n,).
    """

    interest: NDArray[np.float64]
    logits: NDArray[np.float64]
    slopes: NDArray[np.float64]
    duration_ms: NDArray[np.int64]


class Outcomes(NamedTuple):
    """What happened: play time in milliseconds (n,) and interactions (n, 9)."""

    play_ms: NDArray[np.int64]
    interactions: NDArray[np.bool_]


def slopes(groups: bool) -> NDArray[np.float64]:
    """Return the slopes c_t of interactions; 0 in worlds whose groups have nothing in common."""
    return np.zeros(len(INTERACTIONS)) if groups else np.array(SLOPES)


def watch_probabilities(expected: Expected) -> NDArray[np.float64]:
    """Return P(label) of the five watch labels (n, 5): Φ of the distance to the smallest play."""
    columns = []
    for rule in WATCH_RULES:
        least = smallest_play_ms(rule, expected.duration_ms)
        needed = (np.log(least / expected.duration_ms) - PLAY_OFFSET) / PLAY_SLOPE
        distance = (expected.interest - needed) / INTEREST_NOISE
        columns.append(ndtr(-distance if rule == "skip" else distance))
    return np.column_stack(columns)


def interaction_probabilities(expected: Expected, nodes: int = NODES) -> Floats:
    """Return P(interaction) (n, 9), the noise integrated out by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    slope = expected.slopes.astype(np.float32)
    total = np.empty(expected.logits.shape, dtype=np.float32)
    for start in range(0, len(total), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        center = _centers(expected, some)
        sums = np.zeros_like(center)
        for point, weight in zip(points, weights, strict=True):
            at = expit(center + slope * np.float32(INTEREST_NOISE * point))
            at *= np.float32(weight)
            sums += at
        total[some] = sums
    return total


def truth(expected: Expected) -> NDArray[np.float32]:
    """Return the true probabilities of all 14 tasks (n, 14), those of an oracle.

    They lie in [2⁻²⁴, 1 − 2⁻²⁴], so that their log-loss is finite.
    """
    watch = watch_probabilities(expected).astype(np.float32)
    both = np.column_stack([watch, interaction_probabilities(expected)])
    return np.clip(both, SMALLEST, np.float32(1.0) - SMALLEST)


def draw_outcomes(expected: Expected, rng: np.random.Generator) -> Outcomes:
    """Draw the noise of interest, and from the interest play times and interactions."""
    rows = len(expected.interest)
    interest = expected.interest + INTEREST_NOISE * rng.standard_normal(rows)
    play = expected.duration_ms * np.exp(PLAY_SLOPE * interest + PLAY_OFFSET)
    logits = expected.logits + interest[:, None] * expected.slopes
    return Outcomes(np.floor(play).astype(np.int64), rng.random(logits.shape) < expit(logits))


def intercepts(expected: Expected, rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what to add to the logits so that mean true probabilities are ``rates`` (9,).

    Newton's method on the logarithm of the mean, which is nearly linear for rare behaviours.
    """
    shift = np.log(rates)
    for _ in range(30):
        shifted = expected._replace(logits=expected.logits + shift)
        mean = interaction_probabilities(shifted, nodes=8).mean(axis=0, dtype=np.float64)
        change = np.log(rates / mean)
        shift = shift + change
        if np.abs(change).max() < 1e-4:
            break
    return shift


def _centers(expected: Expected, rows: slice) -> NDArray[np.float32]:
    center = expected.logits[rows] + expected.interest[rows, None] * expected.slopes
    return center.astype(np.float32)


assert len(TASKS) == len(WATCH_RULES) + len(INTERACTIONS)
