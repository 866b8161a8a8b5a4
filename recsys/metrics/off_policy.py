"""What another policy would have earned, from the log of one that recorded its probabilities."""

from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError, check_option, check_positive
from harness.evidence import Interval, Resamples, Scores
from recsys.metrics.probabilities import numbered_users


class OffPolicy(NamedTuple):
    """Estimates of the mean reward of a policy.

    Attributes:
        ips: Σ w r / N, w = target over logged probability: unbiased without clipping.
        snips: Σ w r / Σ w, self-normalized: a little biased, less variable (Swaminathan and
            Joachims, 2015).
        effective: Effective sample size (Σ w)² / Σ w².
        clipped: Fraction of rows whose weight was clipped.
        rows: Rows N of the log.
    """

    ips: Interval
    snips: Interval
    effective: float
    clipped: float
    rows: int


def importance_weights(
    target: ArrayLike, logged: ArrayLike, *, clip: float | None = None
) -> np.ndarray:
    """Return target over logged probability of the actions of a log, clipped (N,).

    Args:
        target: (N,) probability of the logged action under the policy in question.
        logged: (N,) probability with which it was logged.
        clip: Largest weight; none by default.

    Raises:
        GatesError: Lengths differ, a logged probability is outside of (0, 1], or one of the
            target outside of [0, 1].
        ValueError: ``clip`` is not positive.
    """
    check_positive(clip=clip)
    wanted, known = np.asarray(target, dtype=float), np.asarray(logged, dtype=float)
    if wanted.ndim != 1 or wanted.shape != known.shape:
        raise GatesError(f"target {wanted.shape} and logged {known.shape} must be (N,) both")
    if not ((known > 0) & (known <= 1)).all():
        raise GatesError(
            "logged probabilities must lie in (0, 1]: an action that is never shown tells nothing "
            f"about it, found {known.min():.4g} to {known.max():.4g}"
        )
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise GatesError(
            f"target probabilities lie in [0, 1], found {wanted.min():.4g} to {wanted.max():.4g}"
        )
    weights = wanted / known
    return weights if clip is None else np.minimum(weights, clip)


def off_policy(
    rewards: ArrayLike,
    target: ArrayLike,
    logged: ArrayLike,
    *,
    clip: float | None = None,
    clusters: ArrayLike | None = None,
    interval: Literal["normal", "bootstrap"] = "normal",
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> OffPolicy:
    """Estimate the mean reward of a policy from the log of another one.

    Args:
        rewards: (N,) reward of each row, such as a click.
        target: (N,) probability of the logged action under the policy in question.
        logged: (N,) probability with which it was logged.
        clip: Largest weight; a smaller one has less variance and more bias.
        clusters: (N,) what is independent, such as users; rows by default.
        interval: ``normal``, from the variance of the ratio between clusters; or ``bootstrap`` over
            clusters.
        resamples: Of the bootstrap.
        level: Coverage of the intervals.
        seed: Of the bootstrap.

    Raises:
        GatesError: Lengths differ, there is no row, or a probability is none.
        ValueError: ``interval`` is unknown, or ``clip`` not positive.
    """
    check_option("interval", interval, ("normal", "bootstrap"))
    weights = importance_weights(target, logged, clip=clip)
    reward = np.asarray(rewards, dtype=float)
    if reward.shape != weights.shape or not len(reward) or not np.isfinite(reward).all():
        raise GatesError(
            f"rewards have shape {reward.shape}, expected one finite number for each of "
            f"{len(weights)} rows, and one row at least"
        )
    ids = np.arange(len(reward)) if clusters is None else clusters
    names, index = numbered_users(ids, len(reward))
    sums = _sums(reward, weights, index, len(names))
    if interval == "normal":
        ips, snips = (_normal(sums[:, 0], sums[:, k], level) for k in (2, 1))
    else:
        draws = Resamples.clusters(names, resamples=resamples, level=level, seed=seed)
        found = draws.intervals(_scores(sums))
        ips, snips = found["ips"], found["snips"]
    squares = float(weights @ weights)
    effective = float(weights.sum()) ** 2 / squares if squares else 0.0
    cut = 0.0 if clip is None else float((np.divide(target, logged) > clip).mean())
    return OffPolicy(ips, snips, effective, cut, len(reward))


def _sums(reward: np.ndarray, weights: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Return Σ w r, Σ w and the rows of every cluster (C, 3)."""
    columns = (weights * reward, weights, np.ones(len(reward)))
    return np.stack([np.bincount(index, column, size) for column in columns], 1)


def _scores(sums: np.ndarray) -> Scores:
    def scores(drawn: np.ndarray) -> dict[str, np.ndarray]:
        earned, weight, rows = np.moveaxis(drawn @ sums, -1, 0)
        none = np.full(rows.shape, np.nan)
        return {
            "ips": np.divide(earned, rows, out=none.copy(), where=rows > 0),
            "snips": np.divide(earned, weight, out=none, where=weight > 0),
        }

    return scores


def _normal(above: np.ndarray, below: np.ndarray, level: float) -> Interval:
    """Return the ratio of two sums over clusters (C,) with the delta method's interval."""
    count, total = len(above), float(below.sum())
    if total == 0:
        return Interval(float("nan"), float("nan"), float("nan"), count)
    value = float(above.sum()) / total
    if count < 2:
        return Interval(value, float("nan"), float("nan"), count)
    residuals = above - value * below
    error = float(np.sqrt(residuals @ residuals * count / (count - 1))) / total
    reach = NormalDist().inv_cdf(0.5 + level / 2) * error
    return Interval(value, value - reach, value + reach, count)
