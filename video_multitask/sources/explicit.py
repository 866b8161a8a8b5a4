"""Real rows of KuaiRand-27K that were selected on like and hate: click and long view, no ids.

The rows are no sample of what users see, and a video's number of rows tells whether it was liked,
so that only ``is_click`` and ``long_view`` are predicted, without any id or count of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.data.leaks import permute_labels
from recsys.data.readers.files import read_table
from recsys.data.tables import RankingTables, rolling_windows
from recsys.schema import ENCODERS, Dense, FeatureSchema, History, Sparse, Task
from video_multitask.feed import follows, with_play_time
from video_multitask.history import add_history

OUTCOMES, BY_RULE = ("is_click", "long_view"), ("effective_view", "long_view")
SECONDS = (7, 12, 18, 30, 60, 120)
"""Edges of the classes of duration that an event of a history has."""

BEHAVIORS = ("is_like", "is_comment", "is_profile_enter", "is_follow", "is_forward")
DONE = (*BEHAVIORS, "watched", "played")
"""What else a user did before: behaviors, the fraction watched and the logarithm of play time."""

RECENT = (1, 5, 20)
EVENT_DIM = 16
MISSING_CODE = -124
USER_CODES = (
    "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author",
    "follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)  # fmt: skip
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
LOG_NUMBERS = ("user_id", "time_ms", "date", "hourmin", "duration_ms", "play_time_ms", *OUTCOMES,
               *BEHAVIORS)  # fmt: skip
HOUR_MS = 3_600_000


class ExplicitLog:
    """One of several test windows that roll over the log, two days each by default.

    Features: the user table without the user's id, hour, day of the week and duration, and what the
    user did strictly before: means of outcomes and other behaviors, of the last 1, 5 and 20 events
    too, their number, the hours since the last one, and the last 30 events (duration and outcomes).

    Args:
        path: The log, ``kuairand27k_explicit_log.parquet``.
        users_path: The user table, ``kuairand_user_features.parquet``.
        window: Number of the test window, the earliest is 0.
        windows: Number of windows; their test parts do not overlap.
        events: Newest events of a history.
        encoder: How they become one vector: ``mean``, ``target_attention``, ``transformer``, or
            ``none`` to leave them out.
        dim: Features of an embedding.
        permuted: Permute labels and other behaviors of all rows, together, before anything is
            computed of them: a control in which nothing can be predicted; None is no.
        leak: Name of a task whose label, with noise, becomes an input: a planted leak; None is
            none.
        play_time: Labels follow from the play time by rule, where the duration is known: as
            thresholds of the play time, which is predicted, or, if False, as labels; None leaves
            those that were logged.
        days: Days of a window; None is two.

    Raises:
        ValueError: There is no such window, encoder or task, or a number is too small.
    """

    def __init__(
        self,
        path: str,
        users_path: str,
        window: int = 3,
        windows: int = 4,
        events: int = 30,
        encoder: str = "transformer",
        dim: int = 8,
        permuted: bool | None = None,
        leak: str | None = None,
        play_time: bool | None = None,
        days: int | None = None,
    ) -> None:
        check_at_least(1, windows=windows, events=events, dim=dim)
        check_option("encoder", encoder, (*ENCODERS, "none"))
        if leak:
            check_option("leak", leak, OUTCOMES)
        if not 0 <= window < windows:
            raise ValueError(f"window is {window}; choose one of 0 to {windows - 1}")
        self.path, self.users_path = path, users_path
        self.window, self.windows = window, windows
        self.events, self.encoder, self.dim = events, encoder, dim
        self.permuted, self.leak = permuted, leak
        self.play_time, self.days = play_time, days

    def read(self) -> RankingTables:
        """Return the earlier rows, those of the day just before the window, and the window.

        Raises:
            GatesError: A file is missing, lacks a column, or has words instead of numbers.
        """
        table = self.features(self.log())
        table = table.join(self._users(), on="user_id", how="left", maintain_order="left")
        if self.play_time is not None:
            table = table.filter(pl.col("duration_ms").is_not_null())
            times = [table[name].to_numpy() for name in ("play_time_ms", "duration_ms")]
            table = table.with_columns(pl.Series(n, follows(n, *times)) for n in BY_RULE)
        days = self.days or 2
        splits = rolling_windows(table, "date", test=days, validation=1, windows=self.windows)
        split = next(islice(splits, self.window, None))
        notes = (
            "rows were selected on like and hate: a check of the pipeline, no claim of quality",
            f"test window {self.window + 1} of {self.windows}",
        )
        return RankingTables("explicit log", self.schema(), *split, notes=notes)

    def schema(self) -> FeatureSchema:
        """Return the columns without any id."""
        histories: tuple[History, ...] = ()
        if self.encoder != "none":
            kind = self.encoder
            histories = (History("past_event", "last_event", self.events, kind),)  # type: ignore[arg-type]
        outcomes = (*OUTCOMES, *DONE)
        labels = OUTCOMES if self.play_time is None else BY_RULE
        tasks = tuple(Task(name, category="watch") for name in labels)
        means = [f"past_mean_{name}" for name in outcomes]
        recent = [f"recent_{name}_{count}" for name in outcomes for count in RECENT]
        return FeatureSchema(
            tasks=with_play_time(tasks) if self.play_time else tasks,
            sparse=(
                *(Sparse(name, side="user", min_count=5) for name in USER_CODES),
                Sparse("hourmin"),
                Sparse("weekday"),
                Sparse("event", dim=EVENT_DIM, side="item", table="event"),
                Sparse("last_event", dim=EVENT_DIM, side="user", table="event"),
            ),
            dense=(
                *(Dense(name, side="user") for name in USER_NUMBERS),
                Dense("duration_ms", side="item"),
                *(Dense(n, scaling="standardize", side="user") for n in (*means, *recent)),
                Dense("past_count", side="user"),
                Dense("hours_since", side="user"),
                *((Dense("leak", scaling="standardize"),) if self.leak else ()),
            ),
            sequences=histories,
            dim=self.dim,
            user="user_id",
            time="time_ms",
        )

    def log(self) -> pl.DataFrame:
        """Return the rows of the log in the order of time, with what the controls change.

        Raises:
            GatesError: The file is missing, lacks a column, or has words instead of numbers.
        """
        log = _read(self.path, LOG_NUMBERS).sort("time_ms", maintain_order=True)
        if self.permuted:
            log = permute_labels(log, self.schema(), also=(*BEHAVIORS, "play_time_ms"))
        if self.leak:
            noise = np.random.default_rng(0).standard_normal(len(log))
            log = log.with_columns(leak=pl.col(self.leak) + 0.5 * pl.Series(noise))
        return log

    def features(self, log: pl.DataFrame) -> pl.DataFrame:
        """Add to a log in the order of time what is known of each row, and of its user's past."""
        log = log.with_columns(
            duration_ms=pl.when(pl.col("duration_ms") > 0).then(pl.col("duration_ms")),
            weekday=pl.col("date").cast(pl.String).str.to_date("%Y%m%d", strict=False).dt.weekday(),
        ).with_columns(event=_duration_class())
        outcome = pl.concat_str([pl.col("event"), *OUTCOMES], separator=" ")
        log = log.with_columns(
            outcome=outcome,
            when=pl.col("time_ms"),
            watched=(pl.col("play_time_ms") / pl.col("duration_ms")).clip(0, 3),
            played=(pl.col("play_time_ms") + 1).log(),
        )
        outcomes = (*OUTCOMES, *DONE)
        log = add_history(log, self.events, ("outcome", *outcomes, "when"), outcomes)
        log = log.rename({"past_outcome": "past_event"})
        recent = [
            pl.col(f"past_{name}").list.tail(count).list.mean().alias(f"recent_{name}_{count}")
            for name in outcomes
            for count in RECENT
        ]
        since = (pl.col("time_ms") - pl.col("past_when").list.last()) / HOUR_MS
        log = log.with_columns(*recent, hours_since=since)
        return log.with_columns(last_event=pl.col("past_event").list.last())

    def _users(self) -> pl.DataFrame:
        """Return the user table, with null for the code of what is missing."""
        users = _read(self.users_path, ("user_id", *USER_NUMBERS), USER_CODES)
        users = users.with_columns(pl.col("user_id").cast(pl.Int32))
        coded = [n for n, kind in users.schema.items() if kind.is_numeric() and n != "user_id"]
        return users.with_columns(
            pl.when(pl.col(n) != MISSING_CODE).then(pl.col(n)).alias(n) for n in coded
        )


def _read(path: str, numbers: Sequence[str], others: Sequence[str] = ()) -> pl.DataFrame:
    table = read_table(path, columns=[*numbers, *others])
    for name in numbers:
        if not (kind := table[name].dtype).is_numeric():
            raise GatesError(f"{path}, column {name!r}: it holds {kind}, expected numbers")
    return table


def _duration_class() -> pl.Expr:
    """Return the class of the duration as a word."""
    seconds = pl.col("duration_ms") / 1000
    number = pl.sum_horizontal((seconds > edge).cast(pl.Int8) for edge in SECONDS)
    duration_class = pl.concat_str([pl.lit("d"), number.cast(pl.String)])
    return pl.when(seconds.is_null()).then(pl.lit("d?")).otherwise(duration_class)
