"""Scores that are functions of means: errors, roots of mean squares, fractions, ratios."""

from collections.abc import Callable, Collection, Mapping
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

Scores = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Weights (R, N) of N samples in R resamples -> name of a score -> (R,)."""


class SingleUnit:
    """Scores some of which rest on one of the units that are drawn, whatever the others hold.

    Every resample gives them the same value or none, so their intervals are unknown.

    Args:
        scores: The function.
        names: Those that rest on one unit.

    Attributes:
        single: As ``names``.
    """

    def __init__(self, scores: Scores, names: Collection[str]) -> None:
        self._scores, self.single = scores, frozenset(names)

    def __call__(self, weights: np.ndarray) -> Mapping[str, np.ndarray]:
        """Return the scores under weights (R, N)."""
        return self._scores(weights)


def single_of(scores: Scores) -> frozenset[str]:
    """Return which of some scores rest on one unit, as :class:`SingleUnit` tells."""
    return scores.single if isinstance(scores, SingleUnit) else frozenset()


Transform = Callable[[np.ndarray], np.ndarray]
"""Weighted means (R, M) -> score (R,)."""


def moments(values: ArrayLike, transform: Transform | None = None, name: str = "value") -> Scores:
    """Return the score that a transform makes of the means of samples.

    Example::

        moments(squares, root, name="rmse")
        moments(np.stack((own, other), 1), root_ratio, name="rmse_ratio")

    Args:
        values: (N,) or (N, M), one row per sample; a NaN makes the score NaN.
        transform: Weighted means (R, M), M = 1 for values (N,), to the score (R,); the mean itself
            by default.
        name: Of the score.

    Raises:
        ValueError: The shape does not fit; later, weights or a transform of another shape.
    """
    samples = np.asarray(values, dtype=float)
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or not samples.size or (transform is None and samples.shape[1] != 1):
        raise ValueError(
            f"expected values (N,), or (N, M) with a transform, found {np.shape(values)}"
        )

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        if weights.shape[-1] != len(samples):
            raise ValueError(
                f"{weights.shape[-1]} samples are drawn, but {len(samples)} have values"
            )
        means = weights @ samples / weights.sum(-1, keepdims=True)
        score = means[..., 0] if transform is None else np.asarray(transform(means))
        if score.shape != weights.shape[:-1]:
            raise ValueError(f"the transform of means {means.shape} has shape {score.shape}")
        return {name: score}

    return scores


def root(means: np.ndarray) -> np.ndarray:
    """Return the root of a single mean square (..., 1): the transform of an RMSE."""
    return cast(np.ndarray, np.sqrt(means[..., 0]))


def root_ratio(means: np.ndarray) -> np.ndarray:
    """Return the ratio of the roots of two mean squares (..., 2): that of two RMSEs."""
    return cast(np.ndarray, np.sqrt(means[..., 0] / means[..., 1]))
