"""The fields of KuaiRand as features, of user, video and moment, and the tables they are in."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from core_gates.errors import GatesError
from recsys.schema import Dense, Encoder, FeatureSchema, History, Sparse, Task
from video_multitask.history import PREFIX
from video_multitask.tasks import kuairand_tasks

_USER = ("user_active_degree", *(f"onehot_feat{k}" for k in range(18)))
_USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")


def kuairand_schema(
    dim: int = 16,
    *,
    ids: bool = True,
    history: int = 0,
    encoder: Encoder = "mean",
    means: Sequence[str] = (),
    tasks: Sequence[Task] | None = None,
) -> FeatureSchema:
    """Return the fields of a KuaiRand log with its side tables and context.

    Args:
        dim: Features of an embedding.
        ids: Embed users, videos and authors themselves.
        history: Events of ``past_video_id``; 0 for none.
        encoder: Of the history.
        means: Outcomes whose mean over the user's past, ``past_mean_NAME``, is a feature.
        tasks: All ten if None.
    """
    further = [Dense("server_width", side="item"), Dense("server_height", side="item")]
    past = [Dense(f"{PREFIX}mean_{n}", scaling="standardize", side="user") for n in means]
    past += [Dense(f"{PREFIX}count", side="user")] if means else []
    return _schema(
        kuairand_tasks() if tasks is None else tasks,
        dim,
        [*_dense(), *further, *past],
        ids,
        history,
        encoder,
    )


def _dense() -> list[Dense]:
    return [
        *(Dense(name, side="user") for name in _USER_NUMBERS),
        Dense("duration_ms", side="item"),
        Dense("video_age_days", side="item"),
    ]


def _schema(
    tasks: Sequence[Task],
    dim: int,
    dense: Sequence[Dense],
    ids: bool,
    history: int,
    encoder: Encoder,
) -> FeatureSchema:
    sparse = [
        *(Sparse(name, side="user") for name in _USER),
        Sparse("first_tag", side="item"),
        Sparse("upload_type", side="item"),
        Sparse("music_type", side="item"),
        Sparse("tab"),
        Sparse("hour"),
        Sparse("weekday"),
    ]
    if ids or history:
        sparse.append(Sparse("video_id", min_count=2, side="item"))
    if ids:
        sparse += [Sparse("user_id", side="user"), Sparse("author_id", min_count=2, side="item")]
    past = History(f"{PREFIX}video_id", "video_id", history, encoder) if history else None
    return FeatureSchema(
        tasks=tuple(tasks),
        sparse=tuple(sparse),
        dense=tuple(dense),
        sequences=(past,) if past else (),
        dim=dim,
        user="user_id",
        item="video_id",
        time="time_ms",
    )


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
