"""The columns of KuaiRand's files: how they are stored, and which values they may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        dtype: As it is kept.
        low: Smallest value of a number.
        high: Largest value of a number.
        missing: Codes that mean *missing*; they become null.
        blank: Whether it may be empty.
        date: Whether it is a day of the calendar, written like 20220408.
    """

    dtype: type[pl.DataType]
    low: int | None = None
    high: int | None = None
    missing: tuple[int, ...] = ()
    blank: bool = False
    date: bool = False


Columns = Mapping[str, Column]

_ID = Column(pl.Int32, 0, 2**31 - 1)
_FLAG = Column(pl.Int8, 0, 1)
_MS = Column(pl.Int32, 0, 2**31 - 1)
_TEXT = Column(pl.String, blank=True)
_CODE = Column(pl.Int32, 0, 2**31 - 1, missing=(-124,), blank=True)
_FLOAT = Column(pl.Float64, blank=True)

LOG: Columns = {
    "user_id": _ID,
    "video_id": _ID,
    "date": Column(pl.Int32, 20220408, 20220508, date=True),
    "hourmin": Column(pl.Int32, 0, 2359),
    "time_ms": Column(pl.Int64, 1_600_000_000_000, 1_700_000_000_000),
    "is_click": _FLAG,
    "is_like": _FLAG,
    "is_follow": _FLAG,
    "is_comment": _FLAG,
    "is_forward": _FLAG,
    "is_hate": _FLAG,
    "long_view": _FLAG,
    "play_time_ms": _MS,
    "duration_ms": Column(pl.Int32, 0, 2**31 - 1, missing=(0,)),
    "profile_stay_time": _MS,
    "comment_stay_time": _MS,
    "is_profile_enter": _FLAG,
    "is_rand": _FLAG,
    "tab": Column(pl.Int8, 0, 14),
}
"""Of a log. A duration of 0 is missing; a play time far above the duration is a loop."""

OPTIONAL = ("profile_stay_time", "is_rand", "tab")
"""What excerpts of the logs lack; a file of the original folder must have them."""

USERS: Columns = {
    "user_id": _ID,
    "user_active_degree": _TEXT,
    "is_lowactive_period": _CODE,
    "is_live_streamer": _CODE,
    "is_video_author": _CODE,
    **{
        f"{name}{suffix}": _TEXT if suffix else _CODE
        for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
        for suffix in ("", "_range")
    },
    **{f"onehot_feat{k}": _CODE for k in range(18)},
}
"""Of the user table: −124 is the code of a missing value."""

VIDEOS: Columns = {
    "video_id": _ID,
    "author_id": _CODE,
    "video_type": _TEXT,
    "upload_dt": _TEXT,
    "upload_type": _TEXT,
    "visible_status": _FLOAT,
    "video_duration": _FLOAT,
    "server_width": _FLOAT,
    "server_height": _FLOAT,
    "music_id": Column(pl.Int64, 0, 2**63 - 1, missing=(-124,), blank=True),
    "music_type": _FLOAT,
    "tag": _TEXT,
}
"""Of the table of basic video features; ``tag`` is a list of numbers in one string."""

STATISTICS = "stat_"
"""Prefix of the columns of the statistics table, which are averages over the test period, too."""
