"""What an evaluation claims: differences, calibration, the oracle, faults of experts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from recsys.diagnosis.diagnose import diagnose
from recsys.diagnosis.expert_report import ExpertReport
from recsys.experiments.predictions import AUC, AVERAGED, ORACLE, SUMMED, Probabilities
from recsys.inputs import Batch
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
    """

    beats: tuple[str, ...] = ()
    no_worse: dict[str, float] = field(default_factory=dict)
    calibrated: bool = False
    bounded: bool = False
    collapsed: tuple[str, ...] = ()
    healthy: tuple[str, ...] = ()

    def check(self, known: Collection[str]) -> None:
        """Refuse claims about methods that do not exist.

        Args:
            known: Methods and baselines; the mean prediction of the seeds of one is known, too.

        Raises:
            GatesError: A claim names another one.
        """
        named = [*self.beats, *self.no_worse, *self.collapsed, *self.healthy]
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


def _calibration(
    test: Batch, tasks: Sequence[str], found: Sequence[Probabilities], reference: str
) -> list[Bar]:
    weight = test.weight.double().unsqueeze(1).numpy() * test.mask.numpy()
    positives = (weight * test.labels.double().numpy()).sum(0)
    unknown = np.full(len(tasks), np.nan)
    predicted = np.stack([(weight * one).sum(0) for one in found] or [unknown])
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
    for method, own in reports.items():
        for figure in FIGURES:
            found = [r.summary() for r in own]
            values = [min(one[figure], LARGEST) for one in found if figure in one]
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
        rows: Of :func:`fault_rows`.
        collapsed: Methods with an expert that is nearly always zero and one on another scale.
        healthy: Methods without.
    """
    found = {(row.method, row.metric): row for row in rows if row.task == TASK}
    none = Row("", TASK, "", math.nan)
    bars = []
    for method in collapsed:
        for figure, bar in COLLAPSED.items():
            low = found.get((method, figure), none).low
            bars.append(Bar(f"{figure} of {method}, smallest of the seeds", low, ">=", bar))
    for method in healthy:
        for figure, bar in HEALTHY.items():
            high = found.get((method, figure), none).high
            bars.append(Bar(f"{figure} of {method}, largest of the seeds", high, "<=", bar))
    return bars
