"""Who watches when, which video is shown, logged with its propensity, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from video_multitask.feed import WATCH_RULES, smallest_play_ms
from video_multitask.simulator.hidden import (
    CANDIDATES,
    DAY_MS,
    GAP_S,
    INTERACTIONS,
    INTEREST_NOISE,
    LONGEST_SESSION,
    MEAN_SESSION,
    PLAY_OFFSET,
    PLAY_SLOPE,
    POLICY_NOISE,
    POLICY_SHARPNESS,
    RANDOM_FRACTION,
    SLOPES,
    TASKS,
    Hidden,
)

Ints = NDArray[np.int64]

TABS = (0.05, 0.78, 0.06, 0.02, 0.05, 0.01, 0.01, 0.005, 0.002, 0.002, 0.002, 0.003, 0.002, 0.002,
        0.002)  # fmt: skip
SLOTS = 2**20
_AT_ONCE = 2**11
Floats = NDArray[np.floating]
NODES = 32
SMALLEST = np.float32(2.0**-24)
_ROWS_AT_ONCE = 2**12


class Visits(NamedTuple):
    """Rows of a day, in time order.

    Attributes:
        user: Number of the user (n,).
        position: Videos seen before in the session (n,).
        ms: Milliseconds since midnight (n,).
        tab: Page of the app, 0 to 14, one per session (n,).
    """

    user: Ints
    position: Ints
    ms: Ints
    tab: Ints

    def take(self, rows: slice) -> Visits:
        """Return some of the rows."""
        return Visits(*(column[rows] for column in self))


def hour_effect(hour: NDArray[np.integer], size: float) -> NDArray[np.float64]:
    """Return the effect of the local hour on interest: 0 at 21 o'clock, else negative."""
    return size * (np.cos((np.asarray(hour) - 21.0) * (2.0 * np.pi / 24.0)) - 1.0)


def draw_visits(rows: int, activity: NDArray[np.float64], rng: np.random.Generator) -> Visits:
    """Draw sessions of geometric length, of active users more often, until a day is full.

    Args:
        rows: Rows of the day; the last session is cut.
        activity: Relative activity of the users (U,).
        rng: Random generator of the day.
    """
    length = _lengths(rows, rng)
    sessions = len(length)
    edges = np.cumsum(activity)
    user = np.searchsorted(edges, rng.random(sessions) * edges[-1], side="right")
    visits = np.exp(hour_effect(np.arange(24), 1.0))
    hour = np.searchsorted(np.cumsum(visits / visits.sum()), rng.random(sessions))
    start = (np.minimum(hour, 23) + rng.random(sessions)) * 3.6e6
    tab = np.searchsorted(np.cumsum(TABS), rng.random(sessions) * sum(TABS), side="right")

    first = np.concatenate([[0], np.cumsum(length)[:-1]])
    session = np.repeat(np.arange(sessions), length)
    position = np.arange(rows) - first[session]
    gap = np.round(1000.0 * GAP_S * (0.5 + rng.standard_exponential(rows) / 2.0))
    gap[first] = 0.0
    since = np.cumsum(gap)
    since -= since[first][session]
    spent = since[first + length - 1]
    ms = np.floor(np.minimum(start, DAY_MS - 1.0 - spent))[session] + since
    order = np.argsort(ms, kind="stable")
    chosen = session[order]
    return Visits(user[chosen], position[order], ms[order].astype(np.int64), tab[chosen])


def _lengths(rows: int, rng: np.random.Generator) -> Ints:
    lengths, total = [], 0
    while total < rows:
        drawn = rng.geometric(1.0 / MEAN_SESSION, 64 + rows // MEAN_SESSION)
        lengths.append(np.minimum(drawn, LONGEST_SESSION))
        total += int(lengths[-1].sum())
    length = np.concatenate(lengths)
    ends = np.cumsum(length)
    last = int(np.searchsorted(ends, rows))
    length = length[: last + 1]
    length[last] -= ends[last] - rows
    return length


class Exposure(NamedTuple):
    """What was shown: video (n,), propensity (n,), whether at random (n,)."""

    video: NDArray[np.int64]
    propensity: NDArray[np.float64]
    random: NDArray[np.bool_]


class Catalog:
    """The videos that exist on a day.

    Candidates come from a table of slots, of which each video owns a number in proportion to its
    popularity, one at least: a draw is a look-up.

    Attributes:
        factors: Factors and quality of all videos (V, 9).
        available: Videos uploaded by then (A,).
    """

    def __init__(self, hidden: Hidden, day: int) -> None:
        videos = hidden.videos
        self.factors = np.column_stack([hidden.factors(day), videos.bias]).astype(np.float32)
        self.available = np.flatnonzero(videos.upload_day <= day)
        weight = videos.popularity[self.available]
        slots = max(SLOTS, 4 * len(weight))
        counts = np.maximum(1, np.round(weight / weight.sum() * slots)).astype(np.int64)
        self._slots = np.repeat(self.available.astype(np.int32), counts)

    def candidates(self, rows: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Draw candidates (rows, 50) by popularity, with replacement."""
        return self._slots[rng.integers(0, len(self._slots), (rows, CANDIDATES), dtype=np.int32)]


def draw_exposure(
    catalog: Catalog,
    tastes: Sequence[NDArray[np.floating]],
    rng: np.random.Generator,
    *,
    uniform: bool,
) -> Exposure:
    """Choose a video for each row.

    The propensity is the probability of the slot that was chosen among the 50 of the row, given its
    candidates and the noise of their affinities; a policy that chooses a slot uniformly has 1/50.
    Rows at random choose among all videos that exist, and have one over their number.

    Args:
        catalog: Videos of the day.
        tastes: Tastes of the user of each row, (n, 8) each; the one that fits better counts.
        rng: Random generator of the block.
        uniform: Choose a slot uniformly; all else, the candidates included, stays the same.
    """
    rows = len(tastes[0])
    at_random = rng.random(rows) < RANDOM_FRACTION
    anything = catalog.available[rng.integers(0, len(catalog.available), rows)]
    candidates = catalog.candidates(rows, rng)
    logits = rng.standard_normal((rows, CANDIDATES), dtype=np.float32)
    logits *= POLICY_NOISE
    wanted = [np.column_stack([taste, np.ones(rows)]).astype(np.float32) for taste in tastes]
    for start in range(0, rows, _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        factors = catalog.factors[candidates[some]]
        logits[some] += np.maximum.reduce(
            [np.einsum("nck,nk->nc", factors, taste[some]) for taste in wanted]
        )
    logits *= POLICY_SHARPNESS
    np.exp(logits, out=logits)
    pick = rng.random(rows)
    if uniform:
        slot = np.minimum((pick * CANDIDATES).astype(np.int64), CANDIDATES - 1)
        propensity = np.full(rows, 1.0 / CANDIDATES)
    else:
        sums = np.cumsum(logits, axis=1, dtype=np.float64)
        slot = (sums < (pick * sums[:, -1])[:, None]).sum(axis=1)
        propensity = np.take_along_axis(logits, slot[:, None], 1)[:, 0] / sums[:, -1]
    chosen = np.take_along_axis(candidates, slot[:, None], 1)[:, 0].astype(np.int64)
    return Exposure(
        np.where(at_random, anything, chosen),
        np.where(at_random, 1.0 / len(catalog.available), propensity),
        at_random,
    )


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
    for start in range(0, len(total), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        exact = expected.logits[some] + expected.interest[some, None] * expected.slopes
        center = exact.astype(np.float32)
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


assert len(TASKS) == len(WATCH_RULES) + len(INTERACTIONS)
