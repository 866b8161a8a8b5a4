"""Click rates of policies, each estimated from the log of the other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import NamedTuple

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from harness.evidence import Bar, Interval, Row
from recsys.metrics import off_policy

ACTION, GIVEN, REWARD, PROPENSITY = "item_id", "position", "click", "propensity_score"
CLICK_RATE, EFFECTIVE = "click rate", "effective rows"


class CrossEstimate(NamedTuple):
    """The click rate of a policy, from its own log and from that of another policy.

    Attributes:
        policy: Whose click rate.
        log: From whose log it is estimated.
        own: Click rate in its own log.
        estimate: Self-normalized inverse propensity estimate (SNIPS).
        effective: Effective sample size of the estimate.
    """

    policy: str
    log: str
    own: Interval
    estimate: Interval
    effective: float

    @property
    def gap(self) -> float:
        """By how much the click rate lies outside of the interval of the estimate; 0 inside."""
        return max(self.estimate.low - self.own.value, self.own.value - self.estimate.high, 0.0)


def cross_estimates(logs: Mapping[str, pl.DataFrame]) -> list[CrossEstimate]:
    """Return the click rate of every policy, estimated from the log of each other one.

    Rows count as independent, and no weight is clipped. See :func:`action_probabilities` for the
    probability of an item under a policy.

    Args:
        logs: Name of a policy -> its log, with ``item_id``, ``position``, ``click`` and
            ``propensity_score``, as in :meth:`recsys.data.readers.OpenBandit.log`.

    Raises:
        GatesError: A log lacks a column or has no row.
    """
    for name, log in logs.items():
        wanted = (ACTION, GIVEN, REWARD, PROPENSITY)
        if lacking := [column for column in wanted if column not in log.columns]:
            raise GatesError(f"the log of policy {name} lacks the column {lacking[0]!r}")
        if not len(log):
            raise GatesError(f"the log of policy {name} has no row")
    made = []
    for policy, other in permutations(logs, 2):
        own, log = logs[policy][REWARD].to_numpy(), logs[other]
        found = off_policy(
            log[REWARD].to_numpy(),
            action_probabilities(logs[policy], log),
            log[PROPENSITY].to_numpy(),
        )
        certain = np.ones(len(own))
        mean = off_policy(own, certain, certain).ips
        made.append(CrossEstimate(policy, other, mean, found.snips, found.effective))
    return made


def action_probabilities(policy: pl.DataFrame, log: pl.DataFrame) -> np.ndarray:
    """Return the probability (N,), under a policy, of every item of a log at its position.

    A policy that recorded the same propensity in all rows chooses uniformly: it has this one for
    every item. Any other may change while it learns: its mean over time is the frequency of the
    item among the rows of the position.

    Args:
        policy: Log of the policy in question (M rows).
        log: Rows of another policy (N rows).
    """
    recorded = policy[PROPENSITY].unique()
    if len(recorded) == 1:
        return np.full(len(log), float(recorded[0]))
    counts = policy.group_by(ACTION, GIVEN).len(name="shown")
    rates = counts.with_columns(rate=pl.col("shown") / pl.col("shown").sum().over(GIVEN))
    joined = log.select(ACTION, GIVEN).join(
        rates, on=[ACTION, GIVEN], how="left", maintain_order="left"
    )
    return joined["rate"].fill_null(0.0).to_numpy()


def cross_rows(found: list[CrossEstimate], *, group: str) -> list[Row]:
    """Return each policy's click rate in its own log and from the other's, as rows of a group."""
    rows = [
        Row(f"{name} in its own log", group, CLICK_RATE, *own)
        for name, own in {one.policy: one.own for one in found}.items()
    ]
    for one in found:
        method = f"{one.policy} from the log of {one.log}"
        rows.append(Row(method, group, CLICK_RATE, *one.estimate))
        rows.append(Row(method, group, EFFECTIVE, one.effective, n=one.estimate.units))
    return rows


def cross_bars(found: list[CrossEstimate]) -> list[Bar]:
    """Return the bars: each interval holds the click rate of the policy in its own log."""
    return [
        Bar(
            f"off-policy: click rate of {one.policy}, outside of its interval from the log of "
            f"{one.log} by",
            one.gap,
            "<=",
            0.0,
        )
        for one in found
    ]
