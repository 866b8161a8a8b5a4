"""What an evaluation claims of its methods: bars on differences, calibration, the oracle."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from recsys.batch import Batch
from recsys.experiments.predictions import Probabilities
from recsys.metrics import gains_over_single

MANY = 2000
"""Positives above which the calibration of a task is claimed."""

BEATEN = 1e-6
"""Least difference of summed log-losses, at the lower end of its interval, that counts as one."""

SUMMED, AUC = "summed log_loss", "auc"
GAIN, WORSE = "gain over single tasks", "tasks worse than alone"
AVERAGED = ", averaged"
"""End of the name of the mean prediction of the seeds of a method."""


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
    oracle: str = "oracle",
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


def gain_rows(per_task: Sequence[Row], single: str) -> list[Row]:
    """Return what every method gains over networks of single tasks, and the tasks that lose.

    The mean relative gain of AUC − ½, and the number of tasks whose AUC is lower: the seesaw.

    Args:
        per_task: Rows of tasks; differences are left out.
        single: Method with a network for each task.
    """
    areas: dict[str, dict[str, float]] = {}
    for row in per_task:
        if row.metric == AUC and not row.versus:
            areas.setdefault(row.method, {})[row.task] = row.value
    if single not in areas:
        return []
    rows = []
    for method, own in areas.items():
        if own.keys() != areas[single].keys():
            continue
        found = gains_over_single(own, areas[single])
        rows += [
            Row(method, "test", GAIN, found.mean, n=max(found.tasks, 1)),
            Row(method, "test", WORSE, float(found.worse), n=max(found.tasks, 1)),
        ]
    return rows


def summary_rows(per_task: Sequence[Row], categories: Mapping[str, str]) -> list[Row]:
    """Return the mean AUC and GAUC of every method over the tasks of each category, AUC first.

    Args:
        per_task: Rows of tasks; differences are left out.
        categories: Task -> category.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in per_task:
        if row.metric in (AUC, "gauc") and not row.versus:
            key = row.method, row.metric, categories[row.task]
            values.setdefault(key, []).append(row.value)
    return [
        Row(method, "test", f"{metric} {category}", float(np.mean(found)))
        for (method, metric, category), found in sorted(values.items(), key=lambda v: v[0][1])
    ]
