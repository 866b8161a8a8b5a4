"""Write a simulated feed as a folder of KuaiRand's files."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from harness.files import replacing
from video_multitask.kuairand.columns import LOG
from video_multitask.kuairand.releases import LOGS
from video_multitask.simulator.log import Simulated

SECOND_PERIOD = 20220422


def export_kuairand(feed: Simulated, folder: str | Path, release: str = "simulated") -> Path:
    """Write the logs and side tables as CSV files named and split like the originals.

    Rows before 22 April go into the first log. Later ones go into the second, or into the log of
    random videos where ``is_rand`` is 1, which are left out if the feed ends before. Columns that
    KuaiRand does not have come last.

    Args:
        feed: Of :func:`.log.simulate`.
        folder: It is replaced as a whole; ``data`` in it holds the files.
        release: Suffix of the file names.

    Returns:
        The folder ``data``.
    """
    folder = Path(folder)
    late, random = pl.col("date") >= SECOND_PERIOD, pl.col("is_rand") == 1
    parts = {"first": ~late, "second": late & ~random, "random": late & random}
    log = feed.log.select(*LOG, pl.exclude(*LOG))
    with replacing(folder) as temporary:
        data = temporary / "data"
        data.mkdir(parents=True)
        for part, name in LOGS.items():
            rows = log.filter(parts[part])
            if len(rows) or part == "first":
                rows.write_csv(data / f"{name}_{release}.csv")
        feed.users.write_csv(data / f"user_features_{release}.csv")
        feed.videos.write_csv(data / f"video_features_basic_{release}.csv")
        statistics(feed.log).write_csv(data / f"video_features_statistic_{release}.csv")
    return folder / "data"


def statistics(log: pl.DataFrame) -> pl.DataFrame:
    """Return daily averages of each video over the whole log, some columns of KuaiRand's table."""
    days = pl.col("date").n_unique()
    sums = {
        "show_cnt": pl.len(),
        "play_duration": pl.col("play_time_ms").sum(),
        "complete_play_cnt": pl.col("complete").sum(),
        "valid_play_cnt": pl.col("is_click").sum(),
        "long_time_play_cnt": pl.col("long_view").sum(),
        "short_time_play_cnt": pl.col("skip").sum(),
        "like_cnt": pl.col("is_like").sum(),
        "comment_cnt": pl.col("is_comment").sum(),
        "follow_cnt": pl.col("is_follow").sum(),
    }
    averages = [(total / days).alias(name) for name, total in sums.items()]
    return log.group_by("video_id").agg(days.alias("counts"), *averages).sort("video_id")
