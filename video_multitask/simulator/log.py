"""A simulated log with its tables and true probabilities, in memory or as KuaiRand's files.

What a network may know of tastes is in the tables: ``onehot_feat`` codes are noisy quantiles of
them, ``tag`` holds the topic, ``upload_type`` the style, ``follow_user_num`` grows with the
propensity to follow. Codes of missing values, blanks, ranges and lists have the form of the
original tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import ndtr

from harness.files import replacing
from video_multitask.feed import LABELS
from video_multitask.kuairand.releases import LOG, LOGS
from video_multitask.simulator.hidden import FACTORS, INTERACTIONS, TOPICS, Hidden, WorldSettings
from video_multitask.simulator.world import Policy, World

MISSING_CODE = -124
TASTE_CODES = {0: 2, 1: 7, 2: 50, 4: 15, 6: 3, 7: 118, 9: 7, 10: 5}
STYLE_CODES = {5: 34, 11: 5, 12: 2, 13: 2, 14: 2, 15: 2, 16: 2, 17: 2}
OTHER_CODES = {3: 1471, 8: 454}
"""Number of the ``onehot_feat`` and its values, as many as in KuaiRand."""

UPLOADS = (
    "LongImport", "Web", "ShortImport", "Kmovie", "LongPicture", "UNKNOWN", "PictureSet",
    "LongCamera", "ShortCamera", "AiCutVideo", "FollowShoot", "ShareFromOtherApp",
)  # fmt: skip
DEGREES = ("low_active", "middle_active", "high_active", "full_active")
_FOLLOWS = ((0, "0"), (10, "(0,10]"), (50, "(10,50]"), (100, "(50,100]"), (150, "(100,150]"),
            (250, "(150,250]"), (500, "(250,500]"), (None, "500+"))  # fmt: skip
_FANS = ((0, "0"), (9, "[1,10)"), (99, "[10,100)"), (999, "[100,1k)"), (4999, "[1k,5k)"),
         (9999, "[5k,1w)"), (99_999, "[1w,10w)"), (None, "[10w,100w)"))  # fmt: skip
_FRIENDS = ((0, "0"), (4, "[1,5)"), (29, "[5,30)"), (59, "[30,60)"), (119, "[60,120)"),
            (249, "[120,250)"), (None, "250+"))  # fmt: skip
_DAYS = ((14, "8-14"), (30, "15-30"), (60, "31-60"), (90, "61-90"), (180, "91-180"),
         (365, "181-365"), (730, "366-730"), (None, "730+"))  # fmt: skip
SECOND_PERIOD = 20220422


def user_table(hidden: Hidden, rng: np.random.Generator) -> pl.DataFrame:
    """Return the 31 columns of KuaiRand's user table."""
    users = hidden.users
    count = len(users.activity)
    rank = users.activity.argsort().argsort() / count
    pull = users.propensity[:, INTERACTIONS.index("follow")]
    follow = _counts(np.minimum(4.5 + pull, 8.0), 0.8, count, rng)
    fans = _counts(4.0, 2.0, count, rng)
    friend = np.minimum(follow, _counts(2.5, 1.2, count, rng))
    days = np.clip(_counts(6.8, 0.7, count, rng), 8, 3_700)
    live = rng.random(count) < 0.23
    columns: dict[str, object] = {
        "user_id": np.arange(count),
        "user_active_degree": np.array(DEGREES)[np.searchsorted((0.02, 0.1, 0.35), rank)],
        "is_lowactive_period": np.zeros(count, dtype=np.int64),
        "is_live_streamer": np.where(live, 1, MISSING_CODE),
        "is_video_author": (rng.random(count) < 0.8).astype(np.int64),
        "follow_user_num": follow,
        "follow_user_num_range": _ranges(follow, _FOLLOWS),
        "fans_user_num": fans,
        "fans_user_num_range": _ranges(fans, _FANS),
        "friend_user_num": friend,
        "friend_user_num_range": _ranges(friend, _FRIENDS),
        "register_days": days,
        "register_days_range": _ranges(days, _DAYS),
    }
    codes = _codes(users.tastes[0], TASTE_CODES, rng) | _codes(users.style_taste, STYLE_CODES, rng)
    codes |= {k: rng.integers(0, n, count).astype(float) for k, n in OTHER_CODES.items()}
    for number in range(18):
        code = codes[number]
        if number == 4 or number >= 12:
            code = np.where(rng.random(count) < 0.03, np.nan, code)
        series = pl.Series(code).fill_nan(None)
        columns[f"onehot_feat{number}"] = series if series.has_nulls() else series.cast(pl.Int64)
    return pl.DataFrame(columns)


def video_table(hidden: Hidden, rng: np.random.Generator) -> pl.DataFrame:
    """Return the 12 columns of KuaiRand's table of basic video features."""
    videos = hidden.videos
    count = len(videos.topic)
    blank = rng.random((2, count)) < [[0.03], [0.013]]
    second = rng.integers(0, TOPICS, count)
    tags = [
        None if blank[1, k] else (f"{a + 1},{b + 1}" if a < b and k % 4 == 0 else str(a + 1))
        for k, (a, b) in enumerate(zip(videos.topic, second, strict=True))
    ]
    day = np.datetime64("2022-04-08") + videos.upload_day.astype("timedelta64[D]")
    wide = rng.random(count) < 0.2
    duration = np.where(blank[0], np.nan, videos.duration_ms.astype(float))
    return pl.DataFrame(
        {
            "video_id": np.arange(count),
            "author_id": videos.author,
            "video_type": np.where(rng.random(count) < 0.01, "AD", "NORMAL"),
            "upload_dt": np.datetime_as_string(day),
            "upload_type": np.array(UPLOADS)[videos.style],
            "visible_status": np.zeros(count),
            "video_duration": pl.Series(duration).fill_nan(None),
            "server_width": np.where(wide, 1280.0, 720.0),
            "server_height": np.where(wide, 720.0, 1280.0),
            "music_id": rng.integers(10**9, 10**10, count),
            "music_type": rng.choice([4.0, 7.0, 8.0, 9.0, 11.0], count),
            "tag": pl.Series(tags, dtype=pl.String),
        }
    )


def _counts(log_median: object, spread: float, count: int, rng: np.random.Generator) -> NDArray:
    drawn = np.asarray(log_median) + spread * rng.standard_normal(count)
    return np.floor(np.exp(drawn)).astype(np.int64)


def _ranges(values: NDArray, bins: tuple[tuple[int | None, str], ...]) -> NDArray:
    edges = [edge for edge, _ in bins if edge is not None]
    return np.array([name for _, name in bins])[np.searchsorted(edges, values)]


def _codes(taste: NDArray, sizes: dict[int, int], rng: np.random.Generator) -> dict[int, NDArray]:
    """Cut each noisy, standardized factor into equally frequent codes."""
    seen = taste * np.sqrt(FACTORS) + 0.3 * rng.standard_normal(taste.shape)
    quantile = ndtr(seen / np.sqrt(1.0 + 0.3**2))
    return {
        number: np.floor(quantile[:, k] * size) for k, (number, size) in enumerate(sizes.items())
    }


class Simulated(NamedTuple):
    """A log and what belongs to it.

    Attributes:
        log: Rows in time order: KuaiRand's 19 columns and those of `.columns.log_columns`.
        users: KuaiRand's user table (31 columns).
        videos: KuaiRand's table of basic video features (12 columns).
        truth: True probabilities (n, 14), in the order of
            `video_multitask.feed.simulated_tasks`.
        world: What they were drawn from; ``world.oracle`` knows the probabilities of other rows.
    """

    log: pl.DataFrame
    users: pl.DataFrame
    videos: pl.DataFrame
    truth: NDArray[np.float32]
    world: World

    def truth_table(self) -> pl.DataFrame:
        """Return the true probabilities as a table, with the name of each behaviour."""
        return pl.DataFrame(self.truth, schema=list(LABELS))


def simulate(
    rows: int = 200_000,
    users: int = 2_000,
    videos: int = 4_000,
    days: int = 14,
    seed: int = 0,
    *,
    draw: int = 0,
    policy: Policy = "logged",
    groups: bool = False,
    heavy_counts: bool = False,
    interests: int = 1,
) -> Simulated:
    """Simulate a feed; the same arguments give the same bytes.

    Logs that need not be in memory come from `.World.stream`.

    Args:
        rows: Rows of the log, spread evenly over the days.
        users: Number of users.
        videos: Number of videos.
        days: Days of the log, from 8 April 2022.
        seed: Of users, videos and tastes.
        draw: Number of the log among those of the same world.
        policy: What chooses the videos: ``logged`` or ``uniform``, over the same candidates.
        groups: Let interactions depend on other factors and fields than watching does.
        heavy_counts: Add four raw heavy-tailed counts, for the stress setting.
        interests: Tastes of a user, of which the one with the larger affinity counts.

    Raises:
        GatesError: The policy is unknown.
        ValueError: A number is too small.
    """
    world = World(WorldSettings(users, videos, days, seed, groups, heavy_counts, interests))
    chunks = list(world.stream(rows, draw=draw, policy=policy))
    return Simulated(
        log=pl.concat([chunk.log for chunk in chunks], rechunk=True),
        users=user_table(world.hidden, np.random.default_rng([seed, 4])),
        videos=video_table(world.hidden, np.random.default_rng([seed, 5])),
        truth=np.concatenate([chunk.truth for chunk in chunks]),
        world=world,
    )


def export_kuairand(feed: Simulated, folder: str | Path, release: str = "simulated") -> Path:
    """Write the logs and side tables as CSV files named and split like the originals.

    Rows before 22 April go into the first log. Later ones go into the second, or into the log of
    random videos where ``is_rand`` is 1, which are left out if the feed ends before. Columns that
    KuaiRand does not have come last.

    Args:
        feed: Of `.log.simulate`.
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
