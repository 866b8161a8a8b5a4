"""Convert the logs of a release once: sorted by time, labelled, joined, in Parquet shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from harness.files import remove, sha256
from video_multitask.fields import add_context, add_sides
from video_multitask.history import UserHistory
from video_multitask.kuairand.folder import ALL, KuaiRand
from video_multitask.kuairand.releases import Part
from video_multitask.stream.shards import ROW_GROUP, Shards, write_shards
from video_multitask.tasks import add_labels

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
