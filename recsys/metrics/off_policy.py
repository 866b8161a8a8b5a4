"""What another policy would have earned, from the log of one that recorded its probabilities."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from harness.evidence import Interval
from recsys.metrics.resampled import per_user_sums


class OffPolicy(NamedTuple):
    """Estimates of the mean reward of a policy.

    Attributes:
        ips: Σ w r / N, w = target over logged probability: unbiased.
        snips: Σ w r / Σ w, self-normalized: a little biased, less variable (Swaminathan and
            Joachims, 2015).
        effective: Effective sample size (Σ w)² / Σ w².
        rows: Rows N of the log.
    """

    ips: Interval
    snips: Interval
    effective: float
    rows: int


def importance_weights(target: ArrayLike, logged: ArrayLike) -> np.ndarray:
    """Return target over logged probability of the actions of a log (N,).

    Args:
        target: (N,) probability of the logged action under the policy in question.
        logged: (N,) probability with which it was logged.

    Raises:
        GatesError: Lengths differ, a logged probability is outside of (0, 1], or one of the
            target outside of [0, 1].
    """
    wanted, logged_chances = np.asarray(target, dtype=float), np.asarray(logged, dtype=float)
    if wanted.ndim != 1 or wanted.shape != logged_chances.shape:
        raise GatesError(
            f"target {wanted.shape} and logged {logged_chances.shape} must be (N,) both"
        )
    if not ((logged_chances > 0) & (logged_chances <= 1)).all():
        raise GatesError(
            "logged probabilities must lie in (0, 1]: an action that is never shown tells nothing "
            f"about it, found {logged_chances.min():.4g} to {logged_chances.max():.4g}"
        )
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise GatesError(
            f"target probabilities lie in [0, 1], found {wanted.min():.4g} to {wanted.max():.4g}"
        )
    return wanted / logged_chances


def off_policy(
    rewards: ArrayLike,
    target: ArrayLike,
    logged: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
) -> OffPolicy:
    """Estimate the mean reward of a policy from the log of another one.

    Intervals of 95 % come from the variance of the ratio between clusters.

    Args:
        rewards: (N,) reward of each row, such as a click.
        target: (N,) probability of the logged action under the policy in question.
        logged: (N,) probability with which it was logged.
        clusters: (N,) what is independent, such as users; rows by default.

    Raises:
        GatesError: Lengths differ, there is no row, or a probability is none.
    """
    weights = importance_weights(target, logged)
    reward = np.asarray(rewards, dtype=float)
    if reward.shape != weights.shape or not len(reward) or not np.isfinite(reward).all():
        raise GatesError(
            f"rewards have shape {reward.shape}, expected one finite number for each of "
            f"{len(weights)} rows, and one row at least"
        )
    ids = np.arange(len(reward)) if clusters is None else clusters
    _, sums = per_user_sums(ids, np.stack((weights * reward, weights, np.ones(len(reward))), 1))
    ips, snips = (_normal(sums[:, 0], sums[:, k]) for k in (2, 1))
    squares = float(weights @ weights)
    effective = float(weights.sum()) ** 2 / squares if squares else 0.0
    return OffPolicy(ips, snips, effective, len(reward))


def _normal(above: np.ndarray, below: np.ndarray) -> Interval:
    """Return the ratio of two sums over clusters (C,) with the delta method's interval."""
    count, total = len(above), float(below.sum())
    if total == 0:
        return Interval(float("nan"), float("nan"), float("nan"), count)
    value = float(above.sum()) / total
    if count < 2:
        return Interval(value, float("nan"), float("nan"), count)
    residuals = above - value * below
    error = float(np.sqrt(residuals @ residuals * count / (count - 1))) / total
    reach = NormalDist().inv_cdf(0.975) * error
    return Interval(value, value - reach, value + reach, count)
