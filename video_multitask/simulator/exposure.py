"""Which video is shown: a softmax over candidates, logged with its propensity, or any at random."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from video_multitask.simulator.hidden import Hidden
from video_multitask.simulator.settings import (
    CANDIDATES,
    POLICY_NOISE,
    POLICY_SHARPNESS,
    RANDOM_FRACTION,
)

SLOTS = 2**20
_AT_ONCE = 2**11


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
    catalog: Catalog, taste: NDArray[np.floating], rng: np.random.Generator, *, uniform: bool
) -> Exposure:
    """Choose a video for each row.

    The propensity is the probability of the slot that was chosen among the 50 of the row, given its
    candidates and the noise of their affinities; a policy that chooses a slot uniformly has 1/50.
    Rows at random choose among all videos that exist, and have one over their number.

    Args:
        catalog: Videos of the day.
        taste: Taste of the user of each row (n, 8).
        rng: Random generator of the block.
        uniform: Choose a slot uniformly; all else, the candidates included, stays the same.
    """
    rows = len(taste)
    at_random = rng.random(rows) < RANDOM_FRACTION
    anything = catalog.available[rng.integers(0, len(catalog.available), rows)]
    candidates = catalog.candidates(rows, rng)
    logits = rng.standard_normal((rows, CANDIDATES), dtype=np.float32)
    logits *= POLICY_NOISE
    wanted = np.column_stack([taste, np.ones(rows)]).astype(np.float32)
    for start in range(0, rows, _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        logits[some] += np.einsum("nck,nk->nc", catalog.factors[candidates[some]], wanted[some])
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
