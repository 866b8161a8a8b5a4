"""The faults of mixtures of experts as rows of an evaluation, and the bars that show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from harness.evidence import Bar, Row
from recsys.batch import Batch
from recsys.diagnosis.diagnose import diagnose
from recsys.diagnosis.expert_report import ExpertReport
from recsys.ranker import Ranker

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
