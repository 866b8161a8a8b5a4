"""What a feed predicts, and from what: its behaviours with their rules, and fields of KuaiRand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_option
from recsys.schema import Dense, Encoder, FeatureSchema, History, Sparse, Task, Threshold
from video_multitask.history import PREFIX

WATCH, INTERACTION, NEGATIVE = "watch", "inter", "neg"

LABELS = {
    "effective_view": "is_click",
    "long_view": "long_view",
    "complete": "complete",
    "replay": "replay",
    "skip": "skip",
    "like": "is_like",
    "comment_stay": "comment_stay",
    "profile_enter": "is_profile_enter",
    "collect": "is_collect",
    "comment": "is_comment",
    "follow": "is_follow",
    "forward": "is_forward",
    "download": "is_download",
    "hate": "is_hate",
}
"""Column of each behaviour; those of KuaiRand keep their names."""

UNWANTED = frozenset({"skip", "hate"})
"""Behaviours that speak against a video: no list is ordered by them."""

NEEDS_DURATION = frozenset({"complete", "replay"})
KUAIRAND = (
    "effective_view", "long_view", "complete",
    "like", "follow", "comment", "forward", "profile_enter", "comment_stay", "hate",
)  # fmt: skip

POST_EXPOSURE = frozenset(
    {*LABELS.values(), "play_time_ms", "profile_stay_time", "comment_stay_time"}
)
"""Columns that exist only after the video was shown: labels and what they are made of."""

PLAY_TIME = "play_time"
RULES = {
    "effective_view": Threshold(PLAY_TIME, factor=1.0, most=7_001.0),
    "long_view": Threshold(PLAY_TIME, factor=1.0, most=18_000.0),
    "complete": Threshold(PLAY_TIME, factor=1.0),
    "replay": Threshold(PLAY_TIME, factor=2.0),
    "skip": Threshold(PLAY_TIME, most=3_000.0, below=True),
}
"""Which play times make each watch label, in units of the duration and in milliseconds.

``effective_view`` (``is_click`` in the one-column feed): played to the end if the video lasts 7 s
at most, else more than 7 s. ``long_view``: to the end if it lasts 18 s at most, else 18 s.
``complete``: to the end. ``replay``: twice as long. ``skip``: less than 3 s.
"""

WATCH_RULES = tuple(RULES)
_NEEDED = ("play_time_ms", "duration_ms")


def category(behaviour: str) -> str:
    """Return the kind of a behaviour."""
    if behaviour in RULES:
        return WATCH
    return NEGATIVE if behaviour == "hate" else INTERACTION


def simulated_tasks() -> tuple[Task, ...]:
    """Return the 14 tasks of the simulator; ``hate`` is an interaction."""
    kinds = {behaviour: category(behaviour) for behaviour in LABELS} | {"hate": INTERACTION}
    return tuple(Task(name, label=LABELS[name], category=kinds[name]) for name in LABELS)


def with_play_time(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Return tasks whose watch labels are thresholds of one play time, which is predicted."""
    whole = Task(PLAY_TIME, "play_time_ms", category=WATCH, kind="regression", scale="duration_ms")
    derived = (
        replace(task, label="", threshold=RULES[task.name]) if task.name in RULES else task
        for task in tasks
    )
    return (whole, *derived)


def kuairand_tasks() -> tuple[Task, ...]:
    """Return the ten tasks of KuaiRand, ``hate`` in a category for itself.

    Those that need the duration, such as ``complete``, count only where it is known.
    """
    return tuple(
        Task(
            name,
            label=LABELS[name],
            category=category(name),
            mask="has_duration" if name in NEEDS_DURATION else "",
        )
        for name in KUAIRAND
    )


def smallest_play_ms(rule: str, duration_ms: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the play time from which on a rule is met; for ``skip``, from which on it is not.

    Args:
        rule: One of `RULES`.
        duration_ms: Durations in milliseconds, any shape.

    Returns:
        Milliseconds, of the same shape.
    """
    check_option("rule", rule, WATCH_RULES)
    factor, most = RULES[rule].ends
    duration = np.asarray(duration_ms, dtype=np.float64)
    least = np.full_like(duration, most)
    if factor < np.inf:
        least = np.minimum(factor * duration, least)
    return least.astype(np.int64)


def follows(
    rule: str, play_ms: NDArray[np.integer], duration_ms: NDArray[np.integer]
) -> NDArray[np.int8]:
    """Return 1 where a rule of `WATCH_RULES` is met, else 0."""
    met = np.asarray(play_ms) >= smallest_play_ms(rule, duration_ms)
    return (met != (rule == "skip")).astype(np.int8)


def add_labels(log: pl.DataFrame) -> pl.DataFrame:
    """Append the labels that a KuaiRand log does not name: complete, replay, skip, comment_stay.

    Columns that exist already are kept. ``complete`` and ``replay`` are 0 where ``duration_ms`` is
    missing or 0, and should not count there: ``has_duration`` is the mask of their tasks.

    Args:
        log: With ``play_time_ms``, ``duration_ms`` and ``comment_stay_time``.

    Raises:
        GatesError: A column is missing.
    """
    needed = [*_NEEDED, "comment_stay_time"]
    if missing := [name for name in needed if name not in log.columns]:
        raise GatesError(
            f"the log lacks {', '.join(missing)}, which labels are made of; a KuaiRand log has "
            f"{', '.join(needed)}"
        )
    has_duration = (pl.col("duration_ms") > 0).fill_null(False)
    play, duration = (log[name].fill_null(0).to_numpy() for name in _NEEDED)
    made = {
        "has_duration": has_duration,
        "complete": has_duration * pl.lit(pl.Series(follows("complete", play, duration))),
        "replay": has_duration * pl.lit(pl.Series(follows("replay", play, duration))),
        "skip": pl.lit(pl.Series(follows("skip", play, duration))),
        "comment_stay": (pl.col("comment_stay_time") > 0).cast(pl.Int8),
    }
    return log.with_columns(e.alias(n) for n, e in made.items() if n not in log.columns)


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
    dense = [Dense(name, side="user") for name in _USER_NUMBERS]
    of_videos = ("duration_ms", "video_age_days", "server_width", "server_height")
    dense += [Dense(name, side="item") for name in of_videos]
    past = [Dense(f"{PREFIX}mean_{n}", scaling="standardize", side="user") for n in means]
    past += [Dense(f"{PREFIX}count", side="user")] if means else []
    return _schema(
        kuairand_tasks() if tasks is None else tasks,
        dim,
        [*dense, *past],
        ids,
        history,
        encoder,
    )


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
