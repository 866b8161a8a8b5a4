"""The public splits: standard, unbiased, random_in; by date and by how a video was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import polars as pl

from core_gates.errors import GatesError, check_option
from video_multitask.stream.shards import Period, Periods

SPLITS = ("standard", "unbiased", "random_in")
PARTS = ("train", "validation", "test")


_RULES: Mapping[str, Periods] = {
    "standard": Periods(
        Period(20220408, 20220419, random=False),
        Period(20220420, 20220421, random=False),
        Period(20220422, 20220508, random=False),
    ),
    "unbiased": Periods(
        Period(20220408, 20220419, random=False),
        Period(20220420, 20220421, random=False),
        Period(20220422, 20220508, random=True),
    ),
    "random_in": Periods(
        Period(20220422, 20220428, random=True),
        Period(20220429, 20220501, random=True),
        Period(20220502, 20220508, random=True),
    ),
}


class Split(NamedTuple):
    """Rows for training, validation and test."""

    train: pl.DataFrame
    validation: pl.DataFrame
    test: pl.DataFrame


def periods_of(split: str) -> Periods:
    """Return the days of a public split.

    ``standard``: recommended videos, trained on 8 to 19 April, validated on the last two days of
    the first log, tested on 22 April to 8 May. ``unbiased``: the same training, tested on random
    videos; the difference of the two tests is the exposure bias. ``random_in``: random videos
    alone, 22 to 28 April, 29 April to 1 May, 2 to 8 May.

    Args:
        split: One of :data:`SPLITS`.

    Raises:
        GatesError: The split is unknown.
    """
    check_option("split", split, SPLITS, GatesError)
    return _RULES[split]


def part_of(split: str) -> pl.Expr:
    """Return the part of each row: ``train``, ``validation``, ``test``, or null for none.

    Args:
        split: See :func:`periods_of`.

    Returns:
        Expression of ``date`` and ``is_rand``.

    Raises:
        GatesError: The split is unknown.
    """
    date, random = pl.col("date"), pl.col("is_rand") == 1
    part = pl.lit(None, dtype=pl.String)
    for name, period in zip(PARTS, periods_of(split), strict=True):
        inside = date.is_between(period.first, period.last) & (random == period.random)
        part = pl.when(inside).then(pl.lit(name)).otherwise(part)
    return part.alias("part")


def split_log(parts: Iterable[pl.DataFrame], split: str) -> Split:
    """Distribute rows, in time order within each part; ties keep the order of the files.

    Args:
        parts: Of the log; without ``is_rand`` all videos count as recommended.
        split: One of :data:`SPLITS`.

    Raises:
        GatesError: The split is unknown, or a part has no rows.
    """
    rule = part_of(split)
    kept = []
    for frame in parts:
        given = frame if "is_rand" in frame.columns else frame.with_columns(is_rand=pl.lit(0))
        kept.append(given.with_columns(rule).filter(pl.col("part").is_not_null()))
    log = pl.concat(kept).sort("time_ms", maintain_order=True) if kept else None
    found = [] if log is None else [log.filter(part=name).drop("part") for name in PARTS]
    empty = [name for name, rows in zip(PARTS, found, strict=False) if not len(rows)]
    if log is None or empty:
        raise GatesError(
            f"the split {split} has no rows for {', '.join(empty or PARTS)}; the log must cover "
            + ", ".join(f"{p.first} … {p.last}" for p in _RULES[split])
        )
    return Split(*found)
