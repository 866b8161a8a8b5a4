"""Logs of a release: their public splits, and shards that are sorted, labelled and joined once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from core_gates.errors import GatesError, check_option
from harness.files import remove, sha256
from recsys.data.tables import Split
from video_multitask.feed import add_context, add_labels, add_sides
from video_multitask.history import UserHistory
from video_multitask.kuairand.folder import ALL, KuaiRand
from video_multitask.kuairand.releases import Part
from video_multitask.stream.shards import ROW_GROUP, Period, Periods, Shards, write_shards

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


def periods_of(split: str) -> Periods:
    """Return the days of a public split.

    ``standard``: recommended videos, trained on 8 to 19 April, validated on the last two days of
    the first log, tested on 22 April to 8 May. ``unbiased``: the same training, tested on random
    videos; the difference of the two tests is the exposure bias. ``random_in``: random videos
    alone, 22 to 28 April, 29 April to 1 May, 2 to 8 May.

    Args:
        split: One of `SPLITS`.

    Raises:
        GatesError: The split is unknown.
    """
    check_option("split", split, SPLITS, GatesError)
    return _RULES[split]


def part_of(split: str) -> pl.Expr:
    """Return the part of each row: ``train``, ``validation``, ``test``, or null for none.

    Args:
        split: See `periods_of`.

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
        split: One of `SPLITS`.

    Raises:
        GatesError: The split is unknown, or a part has no rows.
    """
    rule = part_of(split)
    kept = []
    for frame in parts:
        given = frame if "is_rand" in frame.columns else frame.with_columns(is_rand=pl.lit(0))
        kept.append(given.with_columns(rule).filter(pl.col("part").is_not_null()))
    log = pl.concat(kept).sort("time_ms", maintain_order=True) if kept else None
    tables = [] if log is None else [log.filter(part=name).drop("part") for name in PARTS]
    empty = [name for name, rows in zip(PARTS, tables, strict=False) if not len(rows)]
    if log is None or empty:
        raise GatesError(
            f"the split {split} has no rows for {', '.join(empty or PARTS)}; the log must cover "
            + ", ".join(f"{p.first} … {p.last}" for p in _RULES[split])
        )
    return Split(*tables)


DAY_MS = 86_400_000
UTC_PLUS_8_MS = 8 * 3_600_000


def prepare(
    data: KuaiRand,
    folder: str | Path,
    *,
    parts: Sequence[Part] = ALL,
    history: UserHistory | None = None,
    sides: bool = True,
    row_group: int = ROW_GROUP,
) -> Shards:
    """Write shards of a log.

    The logs are first distributed by the day of ``time_ms``, since they are not sorted; then each
    day is sorted, so that memory is bounded by the largest day and the side tables.

    Args:
        data: What is read.
        folder: Of the shards; replaced as a whole.
        parts: Logs that are read.
        history: Causal features to add, which use all of these logs.
        sides: Join the user and video tables.
        row_group: Rows of a row group.

    Raises:
        GatesError: A file has a fault; file, line and column are named.
    """
    folder = Path(folder)
    days = folder.with_name(f".{folder.name}.days")
    remove(days)
    days.mkdir(parents=True)
    try:
        by_day = _distribute(data.log(parts), days)
        rows = _finished(data, by_day, history, sides)
        source = {"path": data.path.name, "release": data.release, "parts": list(parts)}
        if data.path.is_file():
            source["sha256"] = sha256(data.path)
        return write_shards(rows, folder, row_group=row_group, source=source)
    finally:
        remove(days)


def _distribute(log: Iterator[pl.DataFrame], folder: Path) -> list[Path]:
    """Write a file for each day in China, in the order of the log; return them by day."""
    writers: dict[int, pq.ParquetWriter] = {}
    day = (pl.col("time_ms") + UTC_PLUS_8_MS) // DAY_MS
    try:
        for part in log:
            by_day = part.group_by(day.alias("day"), maintain_order=True)
            for (number,), rows in by_day:
                table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
                if number not in writers:
                    writers[number] = pq.ParquetWriter(folder / f"{number}.parquet", table.schema)
                writers[number].write_table(table)
    finally:
        for writer in writers.values():
            writer.close()
    return [folder / f"{number}.parquet" for number in sorted(writers)]


def _finished(
    data: KuaiRand, days: Sequence[Path], history: UserHistory | None, sides: bool
) -> Iterator[pl.DataFrame]:
    users, videos = (data.users(), data.videos()) if sides else (None, None)
    for path in days:
        day = add_labels(pl.read_parquet(path).sort("time_ms", maintain_order=True))
        if history is not None:
            day = history.add(day)
        yield add_context(add_sides(day, users, videos))
