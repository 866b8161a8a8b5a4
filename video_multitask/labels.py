"""Behaviours that follow from how long a video was played: the label rules of KuaiRand.

Every rule is a smallest play time in milliseconds, so that a table of labels and the probabilities
of the simulator use the same numbers. Durations of 0 are missing: no rule decides there.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_option

VALID_PLAY_MS = 7_000
LONG_VIEW_MS = 18_000
SKIP_MS = 3_000
PLAYS_OF_REPLAY = 2

WATCH_RULES = ("effective_view", "long_view", "complete", "replay", "skip")
_NEEDED = ("play_time_ms", "duration_ms")


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
