"""Controls of a simulated feed: rates of its world, and off-policy estimates of redrawn logs.

L logs, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least, check_option
from harness.evidence import Bar, Interval, Row
from recsys.metrics import off_policy
from video_multitask.feed import LABELS
from video_multitask.simulator.hidden import BASE_RATES, CANDIDATES, TASKS, WATCH_TASKS
from video_multitask.simulator.world import Chunk, World
from video_multitask.sources.simulated import TRUTH

ESTIMATED = ("effective_view", "like")
"""Tasks whose rate is estimated: a frequent and a rare one."""

LOGS, ROWS, TRUTH_ROWS = 100, 4_000, 400_000
COVERED = 0.85
"""Fraction of the intervals of 95 % that must hold the true value."""

COVERAGE, RATE, EFFECTIVE = "coverage", "mean rate", "effective rows"
WATCH_RATES = dict(zip(WATCH_TASKS, (0.54, 0.35, 0.19, 0.07, 0.24), strict=True))
"""Rate of each watch label under the logging policy."""

WATCH_WITHIN, INTERACTION_WITHIN = 0.04, 0.1
"""Largest difference of the rate of a watch label, and relative one of an interaction's."""


class Redrawn(NamedTuple):
    """Estimates from L logs of one world, and the truth.

    Attributes:
        tasks: Names of the tasks.
        truth: Mean true probability under the uniform policy (T,), of a large log of it.
        weighted: SNIPS estimate and the ends of its interval (L, T, 3).
        plain: Mean of the log, as if the policy had been the same, likewise (L, T, 3).
        effective: Effective sample size of each log (L,).
    """

    tasks: tuple[str, ...]
    truth: NDArray[np.float64]
    weighted: NDArray[np.float64]
    plain: NDArray[np.float64]
    effective: NDArray[np.float64]

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Redrawn:
        """Rebuild the estimates from the plain values of `figures`."""
        arrays = (np.asarray(figures[name], dtype=float) for name in cls._fields[1:])
        return cls(tuple(figures["tasks"]), *arrays)

    def figures(self) -> dict[str, Any]:
        """Return plain values of JSON."""
        return {"tasks": list(self.tasks)} | {
            name: np.round(getattr(self, name), 8).tolist() for name in self._fields[1:]
        }

    def covered(self, estimates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the fraction of intervals (L, T, 3) that hold the truth (T,)."""
        return ((estimates[..., 1] <= self.truth) & (self.truth <= estimates[..., 2])).mean(0)


def redraw(
    world: World,
    tasks: Sequence[str] = ESTIMATED,
    *,
    logs: int = LOGS,
    rows: int = ROWS,
    truth_rows: int = TRUTH_ROWS,
    tick: Callable[[], None] = lambda: None,
) -> Redrawn:
    """Estimate the value of the uniform policy over the same candidates, from each of many logs.

    A slot of the candidates has probability 1/50 under that policy. Rows whose video was drawn from
    all that exist are the same under both policies, and have weight 1. Intervals are normal ones,
    from the variance between users.

    Args:
        world: What logs are drawn from.
        tasks: Behaviors whose rate is estimated.
        logs: Number of logs L; the truth comes from one more.
        rows: Rows of each.
        truth_rows: Rows of the log of the uniform policy.
        tick: Called after every log.

    Raises:
        GatesError: A task is unknown.
        ValueError: A number is too small.
    """
    check_at_least(1, logs=logs, rows=rows, truth_rows=truth_rows)
    for task in tasks:
        check_option("task", task, TASKS, GatesError)
    truth = _mean_truth(world.stream(truth_rows, draw=logs, policy="uniform"))
    estimates, effective = np.empty((2, logs, len(tasks), 3)), np.empty(logs)
    for number in range(logs):
        log = pl.concat([chunk.log for chunk in world.stream(rows, draw=number)])
        users, logged = log["user_id"].to_numpy(), log["propensity"].to_numpy()
        uniform = np.where(log["is_rand"].to_numpy() == 1, logged, 1.0 / CANDIDATES)
        for place, task in enumerate(tasks):
            reward = log[LABELS[task]].to_numpy()
            estimate = off_policy(reward, uniform, logged, clusters=users)
            estimates[0, number, place] = _ends(estimate.snips)
            same = off_policy(reward, logged, logged, clusters=users)
            estimates[1, number, place] = _ends(same.snips)
            effective[number] = estimate.effective
        tick()
    true = truth[[TASKS.index(task) for task in tasks]]
    return Redrawn(tuple(tasks), true, estimates[0], estimates[1], effective)


def redrawn_rows(found: Redrawn, *, group: str) -> list[Row]:
    """Return what the estimates say, next to the truth and to the mean of the logs."""
    logs, rows = len(found.effective), []
    for place, task in enumerate(found.tasks):
        rows.append(Row(f"uniform policy, {task}", group, RATE, float(found.truth[place])))
        for name, estimates in (("SNIPS", found.weighted), ("mean of the log", found.plain)):
            method = f"{name}, {task}"
            covered = float(found.covered(estimates)[place])
            rows.append(Row(method, group, RATE, float(estimates[:, place, 0].mean()), n=logs))
            rows.append(Row(method, group, COVERAGE, covered, n=logs))
        rows.append(Row(f"SNIPS, {task}", group, EFFECTIVE, float(found.effective.mean()), n=logs))
    return rows


def redrawn_bars(found: Redrawn) -> list[Bar]:
    """Return the bars: of intervals of 95 %, at least 85 of 100 hold the truth."""
    covered = found.covered(found.weighted)
    return [
        Bar(f"off-policy: intervals of {task} that hold the truth", float(value), ">=", COVERED)
        for task, value in zip(found.tasks, covered, strict=True)
    ]


def _mean_truth(chunks: Iterable[Chunk]) -> NDArray[np.float64]:
    total, rows = np.zeros(len(TASKS)), 0
    for chunk in chunks:
        total += chunk.truth.sum(0, dtype=np.float64)
        rows += len(chunk.truth)
    return total / rows


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


class Rate(NamedTuple):
    """The rate of a behavior.

    Attributes:
        task: The behavior.
        value: Rate of the label of a watch task, mean true probability of an interaction.
        wanted: What it should be.
    """

    task: str
    value: float
    wanted: float

    @property
    def watch(self) -> bool:
        """Whether it is a watch task."""
        return self.task in WATCH_RATES


def rates_of(log: pl.DataFrame) -> list[Rate]:
    """Return the rate of every behavior in a log.

    Args:
        log: With labels and ``truth_…`` columns, as `.SimulatedFeed` reads them.
    """
    true = (f"{TRUTH}{task}" for task in BASE_RATES)
    columns = [*(LABELS[task] for task in WATCH_RATES), *true]
    means = log.select(pl.col(columns).cast(pl.Float64).mean()).row(0)
    wanted = {**WATCH_RATES, **BASE_RATES}
    return [Rate(task, mean, wanted[task]) for task, mean in zip(wanted, means, strict=True)]


def rate_rows(rates: Sequence[Rate], *, group: str) -> list[Row]:
    """Return the rates as rows of a group."""
    return [
        Row(
            "world",
            group,
            f"{'rate' if rate.watch else 'true probability'} of {rate.task}",
            rate.value,
        )
        for rate in rates
    ]


def rate_bars(rates: Sequence[Rate]) -> list[Bar]:
    """Return the bars: watch rates within 0.04, mean true interaction probabilities within 10 %."""
    bars = []
    for rate in rates:
        if rate.watch:
            name, gap = f"rate of {rate.task} − {rate.wanted:g}", rate.value - rate.wanted
        else:
            name = f"mean true probability of {rate.task} / {rate.wanted:g} − 1"
            gap = rate.value / rate.wanted - 1.0
        within = WATCH_WITHIN if rate.watch else INTERACTION_WITHIN
        bars.append(Bar(f"world: {name}, either way", abs(gap), "<=", within))
    return bars
