"""What a contest claims: bars on its rows, and controls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from core_gates.errors import GatesError
from harness.evidence import Bar, Interval, Row, compare
from recsys.data.leaks import chance_error
from recsys.diagnosis.diagnose import diagnose
from recsys.diagnosis.expert_report import ExpertReport
from recsys.experiments.predictions import (
    AUC,
    AVERAGED,
    ORACLE,
    SUMMED,
    Probabilities,
    scores_of,
    summed_log_loss_of,
)
from recsys.inputs import Batch
from recsys.metrics import auc, off_policy
from recsys.metrics.resampled import user_resamples
from recsys.ranker import Ranker

MANY = 2000
"""Positives above which the calibration of a task is claimed."""

BEATEN = 1e-6
"""Least difference of summed log-losses, at the lower end of its interval, that counts as one."""

TASK = "experts"
ROWS = 4096
"""Test rows that are measured, the first ones."""

LARGEST = 1e6
"""Ratio of scales that stands for an infinite one: JSON has none."""

FIGURES = (
    "zero_rate_max", "near_zero_rate_max", "scale_ratio", "task_gate_weight_max",
    "gate_weight_max", "occupancy_max", "gradient_share_max", "degraded", "dead",
    "own_weight_min", "own_weight_correlation",
)  # fmt: skip
BEST = "best"
COLLAPSED = {"zero_rate_max": 0.75, "scale_ratio": 20.0}
HEALTHY = {"scale_ratio": 3.0, "near_zero_rate_max": 0.15, "task_gate_weight_max": 0.8}
IN_WORDS = {
    "scale_ratio": "one expert's outputs are over 3 times as large as another's",
    "near_zero_rate_max": "an expert outputs nearly 0 in over 15 % of the cases",
    "task_gate_weight_max": "a gate gives over 80 % of its weight to one expert",
}
"""What it means that a figure of ``HEALTHY`` is out of bounds."""

CLAIMED = tuple(COLLAPSED | HEALTHY)
"""Figures that claims of collapse and health are about."""


@dataclass(frozen=True)
class Claims:
    """Bars of a configuration.

    Attributes:
        beats: Methods whose summed log-loss is above that of the reference, interval included.
        no_worse: Method -> AUC that the reference may lose against it, in every task, at the lower
            end of the interval.
        calibrated: Whether PCOC of the reference lies in 0.9 to 1.1, for every seed, on tasks with
            more than 2,000 positives.
        bounded: Whether no method has a lower summed log-loss than the oracle.
        collapsed: Methods that show expert collapse in every seed.
        healthy: Methods that show none in any.
        margins: ``METHOD - OTHER`` -> largest difference of their summed log-losses, and if that is
            not positive an interval below 0; ``best`` is the network with the lowest one, linear
            models apart.
    """

    beats: tuple[str, ...] = ()
    no_worse: dict[str, float] = field(default_factory=dict)
    calibrated: bool = False
    bounded: bool = False
    collapsed: tuple[str, ...] = ()
    healthy: tuple[str, ...] = ()
    margins: dict[str, float] = field(default_factory=dict)

    def check(self, known: Collection[str]) -> None:
        """Refuse claims about methods that do not exist.

        Args:
            known: Methods and baselines; the mean prediction of the seeds of one is known, too.

        Raises:
            GatesError: A claim names another one.
        """
        named = [*self.beats, *self.no_worse, *self.collapsed, *self.healthy]
        named += [name for pair in self.margins for name in pair.split(" - ", 1) if name != BEST]
        if strangers := [n for n in named if n.removesuffix(AVERAGED) not in known]:
            raise GatesError(
                f"claims name {strangers[0]!r}, not a method; known are {', '.join(known)}"
            )


def claim_bars(
    claims: Claims,
    rows: Sequence[Row],
    reference: str,
    *,
    test: Batch,
    tasks: Sequence[str],
    found: Sequence[Probabilities],
    oracle: str = ORACLE,
) -> list[Bar]:
    """Return the bars of the claims; what was not measured is NaN, and missed.

    Args:
        claims: What is claimed.
        rows: Rows of the evaluation, differences from the reference included.
        reference: The method that claims are about.
        test: Rows that were scored.
        tasks: Names of the tasks.
        found: Predictions (N, T) of the reference, one for each seed.
        oracle: Name of the oracle.
    """
    bars = []
    gaps = {(r.method, r.task, r.metric): r for r in rows if r.versus == reference}
    for method in claims.beats:
        gap = gaps.get((method, "test", SUMMED))
        name = f"summed log-loss of {method} − {reference}, lower end"
        bars.append(Bar(name, gap.low if gap else math.nan, ">=", BEATEN))
    for method, margin in claims.no_worse.items():
        for task in tasks:
            gap = gaps.get((method, task, AUC))
            name = f"AUC of {reference} − {method}, {task}, lower end"
            bars.append(Bar(name, -gap.high if gap else math.nan, ">=", -margin))
    if claims.calibrated:
        bars += _calibration(test, tasks, found, reference)
    if claims.bounded:
        losses = {r.method: r.value for r in rows if r.metric == SUMMED and not r.versus}
        truth = losses.pop(oracle, math.nan)
        best = np.min([*losses.values()]) if losses else math.nan  # NaN if one is
        name = "lowest summed log-loss of a method − that of the oracle"
        bars.append(Bar(name, float(best - truth), ">=", 0.0))
    return bars


def margin_bars(
    margins: Mapping[str, float],
    found: Mapping[str, Sequence[Probabilities]],
    networks: Collection[str],
    test: Batch,
) -> list[Bar]:
    """Return the bars of `Claims.margins`; what was not measured is NaN, and missed.

    Args:
        margins: See there.
        found: Method -> predictions (N, T) of the test rows, one for each seed.
        networks: Methods among which the best is sought.
        test: Rows that were scored.
    """
    losses = {
        method: float(np.mean([summed_log_loss_of(test, predicted) for predicted in found[method]]))
        for method in networks
        if found.get(method)
    }
    bars = []
    for pair, margin in margins.items():
        first, _, other = pair.partition(" - ")
        if first == BEST:
            first = min(losses, key=losses.__getitem__, default=BEST)
        name, gap = f"summed log-loss of {pair.replace(BEST, first)}", None
        if found.get(first) and found.get(other):
            gap = gap_of(found[first], found[other], test)
        bars.append(Bar(name, gap.value if gap else math.nan, "<=", margin))
        if margin <= 0:
            bars.append(Bar(f"{name}, upper end", gap.high if gap else math.nan, "<=", 0.0))
    return bars


def gap_of(found: Sequence[Probabilities], other: Sequence[Probabilities], test: Batch) -> Row:
    """Return what predictions (N, T) of each seed lose to others in summed log-loss.

    Args:
        found: Of one method.
        other: Of the method that is subtracted.
        test: Rows that were scored, whose users are resampled.
    """
    both = {"one": found, "other": other}
    scores = {m: [scores_of(test, f, ())[""] for f in each] for m, each in both.items()}
    rows = compare(scores, user_resamples(test.user.numpy()), task="test", reference="other")
    return next(row for row in rows if row.versus)


def _calibration(
    test: Batch, tasks: Sequence[str], predictions: Sequence[Probabilities], reference: str
) -> list[Bar]:
    weight = test.weight.double().unsqueeze(1).numpy() * test.mask.numpy()
    positives = (weight * test.labels.double().numpy()).sum(0)
    unknown = np.full(len(tasks), np.nan)
    predicted = np.stack(
        [(weight * predicted_once).sum(0) for predicted_once in predictions] or [unknown]
    )
    bars = []
    for number, task in enumerate(tasks):
        if positives[number] > MANY:
            ratios = predicted[:, number] / positives[number]
            name = f"PCOC of {reference}, {task}"
            bars.append(Bar(f"{name}, smallest of the seeds", float(ratios.min()), ">=", 0.9))
            bars.append(Bar(f"{name}, largest of the seeds", float(ratios.max()), "<=", 1.1))
    return bars


def report_of(ranker: Ranker, rows: Batch) -> ExpertReport:
    """Return the report of the experts of a network on the first test rows."""
    return diagnose(ranker, [rows.take(slice(0, ROWS))])


def fault_rows(reports: Mapping[str, Sequence[ExpertReport]]) -> list[Row]:
    """Return the figures of every method: their median over seeds, and the range of seeds.

    Args:
        reports: Method -> one report for each seed; methods without experts have no row.
    """
    rows = []
    for method, seed_reports in reports.items():
        for figure in FIGURES:
            summaries = [r.summary() for r in seed_reports]
            values = [min(summary[figure], LARGEST) for summary in summaries if figure in summary]
            if values:
                low, high = min(values), max(values)
                rows.append(
                    Row(method, TASK, figure, float(np.median(values)), low, high, len(values))
                )
    return rows


def fault_bars(rows: Sequence[Row], collapsed: Sequence[str], healthy: Sequence[str]) -> list[Bar]:
    """Return the bars: collapse of some methods and health of others, in every seed.

    What was not measured, such as the experts of a network without any, is NaN, and missed.

    Args:
        rows: Of `fault_rows`.
        collapsed: Methods with an expert that is nearly always zero and one on another scale.
        healthy: Methods without.
    """
    row_of = {(row.method, row.metric): row for row in rows if row.task == TASK}
    none = Row("", TASK, "", math.nan)
    bars = []
    for method in collapsed:
        for figure, bar in COLLAPSED.items():
            low = row_of.get((method, figure), none).low
            bars.append(Bar(f"{figure} of {method}, smallest of the seeds", low, ">=", bar))
    for method in healthy:
        for figure, bar in HEALTHY.items():
            high = row_of.get((method, figure), none).high
            bars.append(Bar(f"{figure} of {method}, largest of the seeds", high, "<=", bar))
    return bars


LIMIT = 3.0
"""Standard errors within which an AUC of 0.5 is due to chance."""

DISTANCE = "AUC, max |z|"  # |AUC − 0.5| in standard errors
_NORMAL = 1.96
ACTION, GIVEN, REWARD, PROPENSITY = "item_id", "position", "click", "propensity_score"
CLICK_RATE, EFFECTIVE = "click rate", "effective rows"


class Chance(NamedTuple):
    """The AUC of a task, and what chance makes of 0.5.

    Attributes:
        task: The task.
        auc: Area under the ROC curve; NaN where a class is missing.
        error: Standard error of the AUC of labels in random order.
        positives: Positive rows.
    """

    task: str
    auc: float
    error: float
    positives: int

    @property
    def distance(self) -> float:
        """|AUC − 0.5| in standard errors; 0 for constant scores, NaN where a class is missing."""
        gap = abs(self.auc - 0.5)
        return 0.0 if gap == 0 else gap / self.error if self.error else math.nan


def permuted_error(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the standard error of the AUC when labels are in random order.

    √((P + N + 1) / (12 P N) · (1 − Σ (t³ − t) / (n³ − n))) for P positive and N negative of n rows
    and groups of t equal scores (Lehmann, *Nonparametrics*, 1975, appendix 4). It is exact for
    labels that were permuted over rows: given the scores, all their orders are then equally likely,
    even if scores are alike within users, or labels were before.

    Args:
        scores: (n,).
        labels: (n,), 0 or 1.
    """
    positives, rows = int(np.sum(labels)), len(np.asarray(labels))
    _, counts = np.unique(np.asarray(scores), return_counts=True)
    ties = counts.astype(float)
    tied = float((ties**3 - ties).sum()) / max(float(rows) ** 3 - rows, 1.0)
    return chance_error(positives, rows - positives) * math.sqrt(max(0.0, 1.0 - tied))


def chances(rows: Batch, found: Probabilities, tasks: Sequence[str]) -> list[Chance]:
    """Return the AUC of every task, with its error under chance; sample weights are ignored."""
    made = []
    for number, task in enumerate(tasks):
        seen = rows.mask[:, number].numpy()
        labels, scores = rows.labels[:, number].numpy()[seen], found[seen, number]
        value, error = auc(scores, labels).value, permuted_error(scores, labels)
        made.append(Chance(task, value, error, int(labels.sum())))
    return made


def chance_rows(control: str, found: Sequence[Chance], *, group: str) -> list[Row]:
    """Return the largest distance from chance, then the AUC of every task with its interval.

    Args:
        control: Name of the control.
        found: One for each task.
        group: Name of the rows.
    """
    distances = [chance.distance for chance in found if not math.isnan(chance.distance)]
    largest = max(distances, default=math.nan)
    rows = [Row(control, group, DISTANCE, largest, n=max(len(distances), 1))]
    for chance in found:
        reach = _NORMAL * chance.error
        ends = chance.auc - reach, chance.auc + reach
        rows.append(Row(control, group, f"auc, {chance.task}", chance.auc, *ends, chance.positives))
    return rows


def chance_bars(
    control: str, found: Sequence[Chance], sense: Literal["<=", ">="] = "<="
) -> list[Bar]:
    """Return a bar per task that has both classes: within 3 standard errors of 0.5, or beyond."""
    return [
        Bar(
            f"{control}: |AUC − 0.5| of {chance.task}",
            chance.distance,
            sense,
            LIMIT,
            "standard errors",
        )
        for chance in found
        if not math.isnan(chance.distance)
    ]


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

    Rows count as independent, and no weight is clipped. See `action_probabilities` for the
    probability of an item under a policy.

    Args:
        logs: Name of a policy -> its log, with ``item_id``, ``position``, ``click`` and
            ``propensity_score``, as in `recsys.data.readers.OpenBandit.log`.

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
        rewards, log = logs[policy][REWARD].to_numpy(), logs[other]
        estimate = off_policy(
            log[REWARD].to_numpy(),
            action_probabilities(logs[policy], log),
            log[PROPENSITY].to_numpy(),
        )
        certain = np.ones(len(rewards))
        mean = off_policy(rewards, certain, certain).ips
        made.append(CrossEstimate(policy, other, mean, estimate.snips, estimate.effective))
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
        Row(f"{name} in its own log", group, CLICK_RATE, *interval)
        for name, interval in {estimate.policy: estimate.own for estimate in found}.items()
    ]
    for estimate in found:
        method = f"{estimate.policy} from the log of {estimate.log}"
        rows.append(Row(method, group, CLICK_RATE, *estimate.estimate))
        rows.append(Row(method, group, EFFECTIVE, estimate.effective, n=estimate.estimate.units))
    return rows


def cross_bars(found: list[CrossEstimate]) -> list[Bar]:
    """Return the bars: each interval holds the click rate of the policy in its own log."""
    return [
        Bar(
            f"off-policy: click rate of {estimate.policy}, outside of its interval from the log of "
            f"{estimate.log} by",
            estimate.gap,
            "<=",
            0.0,
        )
        for estimate in found
    ]
