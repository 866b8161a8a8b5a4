"""Columns of the user and video tables next to each row of a log, and what follows from them."""

import polars as pl

from core_gates.errors import GatesError


def add_sides(
    log: pl.DataFrame, users: pl.DataFrame | None, videos: pl.DataFrame | None
) -> pl.DataFrame:
    """Join side tables; a user or video that they lack gets nulls, which are *missing* features.

    Raises:
        GatesError: A table repeats a column of the log or of the other table.
    """
    for table, key in ((users, "user_id"), (videos, "video_id")):
        if table is None:
            continue
        if both := sorted((set(table.columns) & set(log.columns)) - {key}):
            raise GatesError(
                f"the table of {key} has the columns {', '.join(both[:5])}, which the log "
                "has, too; drop or rename them in one of the two"
            )
        typed = table.with_columns(pl.col(key).cast(log.schema[key]))
        log = log.join(typed, on=key, how="left", maintain_order="left")
    return log


def add_context(log: pl.DataFrame) -> pl.DataFrame:
    """Append what is known at exposure from columns that exist.

    ``hour`` (0-23) and ``weekday`` (1-7, Monday first) from ``hourmin`` and ``date``,
    ``has_duration``, ``video_age_days`` since ``upload_dt``, ``first_tag`` of the list ``tag``.
    """
    date = pl.date(pl.col("date") // 10_000, pl.col("date") // 100 % 100, pl.col("date") % 100)
    made = {
        "hour": ("hourmin", (pl.col("hourmin") // 100).cast(pl.Int8)),
        "weekday": ("date", date.dt.weekday()),
        "has_duration": ("duration_ms", (pl.col("duration_ms") > 0).fill_null(False)),
        "video_age_days": (
            "upload_dt",
            (date - pl.col("upload_dt").str.to_date(strict=False)).dt.total_days().cast(pl.Int32),
        ),
        "first_tag": ("tag", pl.col("tag").str.split(",").list.first()),
    }
    return log.with_columns(
        value.alias(name)
        for name, (source, value) in made.items()
        if source in log.columns and name not in log.columns
    )
