"""The behaviours that a feed predicts, their kinds, and the label rules of KuaiRand.

Every rule is a smallest play time in milliseconds, so that a table of labels and the probabilities
of the simulator use the same numbers. Durations of 0 are missing: no rule decides there.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_option
from recsys.schema import Task

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

VALID_PLAY_MS = 7_000
LONG_VIEW_MS = 18_000
SKIP_MS = 3_000
PLAYS_OF_REPLAY = 2
WATCH_RULES = ("effective_view", "long_view", "complete", "replay", "skip")
_NEEDED = ("play_time_ms", "duration_ms")


def category(behaviour: str) -> str:
    """Return the kind of a behaviour."""
    if behaviour in ("effective_view", "long_view", "complete", "replay", "skip"):
        return WATCH
    return NEGATIVE if behaviour == "hate" else INTERACTION


def simulated_tasks() -> tuple[Task, ...]:
    """Return the 14 tasks of the simulator; ``hate`` is an interaction."""
    kinds = {behaviour: category(behaviour) for behaviour in LABELS} | {"hate": INTERACTION}
    return tuple(Task(name, label=LABELS[name], category=kinds[name]) for name in LABELS)


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

    ``effective_view`` (``is_click`` in the one-column feed): played to the end if the video lasts
    7 s at most, else more than 7 s. ``long_view``: to the end if it lasts 18 s at most, else 18 s.
    ``complete``: to the end. ``replay``: twice as long. ``skip``: less than 3 s.

    Args:
        rule: One of :data:`WATCH_RULES`.
        duration_ms: Durations in milliseconds, any shape.

    Returns:
        Milliseconds, of the same shape.
    """
    check_option("rule", rule, WATCH_RULES)
    duration = np.asarray(duration_ms, dtype=np.int64)
    if rule == "effective_view":
        return np.where(duration <= VALID_PLAY_MS, duration, VALID_PLAY_MS + 1)
    if rule == "long_view":
        return np.minimum(duration, LONG_VIEW_MS)
    if rule == "skip":
        return np.full_like(duration, SKIP_MS)
    return duration * (PLAYS_OF_REPLAY if rule == "replay" else 1)


def follows(
    rule: str, play_ms: NDArray[np.integer], duration_ms: NDArray[np.integer]
) -> NDArray[np.int8]:
    """Return 1 where a rule of :data:`WATCH_RULES` is met, else 0."""
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
    known = (pl.col("duration_ms") > 0).fill_null(False)
    play, duration = (log[name].fill_null(0).to_numpy() for name in _NEEDED)
    made = {
        "has_duration": known,
        "complete": known * pl.lit(pl.Series(follows("complete", play, duration))),
        "replay": known * pl.lit(pl.Series(follows("replay", play, duration))),
        "skip": pl.lit(pl.Series(follows("skip", play, duration))),
        "comment_stay": (pl.col("comment_stay_time") > 0).cast(pl.Int8),
    }
    return log.with_columns(e.alias(n) for n, e in made.items() if n not in log.columns)
