"""What the correction of interpolation must show, by what is observed."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from harness.evidence import Bar, Row
from weather.experiments.experiment import UNMEASURED
from weather.experiments.osse.rivals import INTERPOLATION
from weather.experiments.twin.scenarios import OsseTask


class Measured(Protocol):
    """Scores that bars are read from, see :class:`~.osse_scores.OsseScores`."""

    tasks: list[OsseTask]
    errors: dict[tuple[str, str], Tensor]
    reports: dict[str, tuple[Tensor, Tensor]]
    climatological_sd: Tensor

    def rows(self) -> list[Row]:
        """Return every figure."""

    def ratio(self, task: str, name: str, other: str) -> Row | None:
        """Return the ratio of two methods; None where one of them is missing."""

    def lost_alone(self, task: str, name: str) -> float:
        """Return how many timelines a method loses that interpolation keeps."""


CORRECTED = "adas_oi"
LIMITS = {
    (True, "perfect"): (0.8, 0.95),
    (True, "error"): (0.8, 1.0),
    (False, "perfect"): (1.0, math.inf),
    (False, "error"): (0.85, math.inf),
}
"""Largest ratio to interpolation and largest upper end of its interval, for sparse reports or not
and for the forecast model."""

INDEPENDENT = 1.3  # climatological standard deviations that a free run must err by
SILENT = 1.1  # error after ten silent days, over that of interpolation
ALONE = 1.02  # error over that of the background with one report alone


def fixed_bars(scores: Measured, task: OsseTask) -> list[Bar]:
    """Return the bars of a task with fixed networks."""
    sparse = task.density <= min(one.density for one in scores.tasks)
    limit, upper = LIMITS[sparse, task.model]
    found = scores.ratio(task.name, CORRECTED, INTERPOLATION)
    bars = [_bar(f"{CORRECTED} over oi, {task.name}", found and found.value, limit)]
    if math.isfinite(upper):
        bars.append(_bar(f"its upper end, {task.name}", found and found.high, upper))
    lost = None if found is None else scores.lost_alone(task.name, CORRECTED)
    bars.append(_bar(f"timelines lost by {CORRECTED} alone, {task.name}", lost, 0.0))
    if sparse and task.model == "perfect":
        free = scores.errors[task.name, "free_run"][..., 0].square().mean().sqrt()
        bars.append(Bar(f"free run over climatological sd, {task.name}",
                        float(free / scores.climatological_sd[0]), ">=", INDEPENDENT))  # fmt: skip
    return bars


def outage_bars(scores: Measured, task: OsseTask) -> list[Bar]:
    """Return the bars of an outage, and those of single reports once."""
    rows = {(row.method, row.metric): row for row in scores.rows() if row.task == task.name}
    changed = rows.get((CORRECTED, "changed"))
    silent = [rows.get((name, "rmse_silent_10_days")) for name in (CORRECTED, INTERPOLATION)]
    bars = [
        _bar(f"change without observations, {task.name}", changed and changed.value, 0.0),
        _bar(f"{CORRECTED} over oi after ten silent days, {task.name}", _over(*silent), SILENT),
    ]
    if task == scores.tasks[0]:
        ratios = scores.reports.get(CORRECTED)
        mean = None if ratios is None else float(ratios[0].double().log().mean().exp())
        bars.append(_bar(f"{CORRECTED} over background, one report alone", mean, ALONE))
    return bars


def declared_bars(scores: Measured, task: OsseTask) -> list[Bar]:
    """Return the bar of reports of mixed quality, whose errors interpolation knows."""
    found = scores.ratio(task.name, CORRECTED, INTERPOLATION)
    return [_bar(f"{CORRECTED} over oi, {task.name}", found and found.value, 1.0)]


def no_bars(scores: Measured, task: OsseTask) -> list[Bar]:  # noqa: ARG001
    """Return nothing: these figures are printed next to others."""
    return []


BARS = {
    "fixed": fixed_bars,
    "outage": outage_bars,
    "declared": declared_bars,
    "withheld": no_bars,
    "denied": no_bars,
}


def _bar(name: str, value: float | None, bar: float) -> Bar:
    if value is None:
        return Bar(name, math.nan, "<=", bar, note=UNMEASURED)
    return Bar(name, value, "<=", bar)


def _over(own: Row | None, other: Row | None) -> float | None:
    return None if own is None or other is None else own.value / other.value
