"""Whether a simulated log has the rates of the world that it should come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from harness.evidence import Bar, Row
from video_multitask.simulator.settings import BASE_RATES, WATCH_TASKS
from video_multitask.sources.simulated import TRUTH
from video_multitask.tasks import LABELS

WATCH_RATES = dict(zip(WATCH_TASKS, (0.54, 0.35, 0.19, 0.07, 0.24), strict=True))
"""Rate of each watch label under the logging policy."""

WATCH_WITHIN, INTERACTION_WITHIN = 0.04, 0.1
"""Largest difference of the rate of a watch label, and relative one of an interaction's."""


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
        log: With labels and ``truth_…`` columns, as :class:`.SimulatedFeed` reads them.
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
            f"{'rate' if one.watch else 'true probability'} of {one.task}",
            one.value,
        )
        for one in rates
    ]


def rate_bars(rates: Sequence[Rate]) -> list[Bar]:
    """Return the bars: watch rates within 0.04, mean true interaction probabilities within 10 %."""
    bars = []
    for one in rates:
        if one.watch:
            name, gap = f"rate of {one.task} − {one.wanted:g}", one.value - one.wanted
        else:
            name = f"mean true probability of {one.task} / {one.wanted:g} − 1"
            gap = one.value / one.wanted - 1.0
        within = WATCH_WITHIN if one.watch else INTERACTION_WITHIN
        bars.append(Bar(f"world: {name}, either way", abs(gap), "<=", within))
    return bars
