"""What was published of KuaiRand: files, their columns, counts, and archives to download."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import polars as pl

from core_gates.errors import GatesError, check_option
from harness.files.digest import RemoteFile
from harness.files.download import download_and_unpack

OPTIONAL = ("profile_stay_time", "is_rand", "tab")
"""What excerpts of the logs lack; a file of the original folder must have them."""

STATISTICS = "stat_"
"""Prefix of the columns of the statistics table, which are averages over the test period, too."""


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


def checked(
    part: pl.DataFrame, columns: Columns, path: str, first: int, *, drop_invalid: bool = False
) -> pl.DataFrame:
    """Return rows with codes of missing values as null and numbers in their narrow types.

    Args:
        part: Consecutive rows of a file.
        columns: Those that are checked, where they exist; others are kept as they are.
        path: Of the file, for messages.
        first: Line of the first row.
        drop_invalid: Leave out rows with wrong values instead of refusing them.

    Raises:
        GatesError: A value is wrong; the first one is named.
    """
    present = [name for name in columns if name in part.columns]
    part = part.with_columns(pl.col(pl.Boolean).cast(pl.Int8))
    for name in present:
        _check_type(part, name, columns[name], path)
    wrong = part.select(_is_wrong(name, columns[name]) for name in present)
    counts = wrong.sum().row(0)
    if any(counts) and not drop_invalid:
        name = min(
            (n for n, count in zip(present, counts, strict=True) if count),
            key=lambda n: wrong[n].arg_max() or 0,
        )
        row = int(wrong[name].arg_max() or 0)
        value, column = part[name][row], columns[name]
        shown = "nothing" if value is None else repr(value)
        raise GatesError(f"{path}, line {first + row}, column {name}: {shown}, {_wanted(column)}")
    if any(counts):
        part = part.filter(~wrong.select(pl.any_horizontal(pl.all())).to_series())
    return part.with_columns(_kept(name, columns[name]) for name in present)


def check_keys(table: pl.DataFrame, key: str, path: str) -> None:
    """Refuse a side table with two rows for one key, which would repeat rows of a log.

    Raises:
        GatesError: A key occurs twice.
    """
    repeated = table[key].is_duplicated()
    if repeated.any():
        row = int(repeated.arg_max() or 0)
        raise GatesError(
            f"{path}, line {row + 2}, column {key}: {table[key][row]} occurs in more than one row; "
            "keep one row per key"
        )


def _check_type(part: pl.DataFrame, name: str, column: Column, path: str) -> None:
    dtype = part.schema[name]
    numbers = dtype.is_numeric() or dtype == pl.Null
    right = dtype in (pl.String, pl.Null, pl.Categorical) if column.dtype == pl.String else numbers
    if not right:
        kind = "text" if column.dtype == pl.String else "numbers"
        raise GatesError(f"{path}, column {name}: holds {dtype}, expected {kind}")


def _is_wrong(name: str, column: Column) -> pl.Expr:
    value, never = pl.col(name), pl.col(name).is_null() & pl.lit(False)
    wrong = never if column.blank else value.is_null()
    if column.dtype == pl.String:
        return wrong.alias(name)
    outside = never
    if column.dtype.is_integer():
        number = value.cast(pl.Float64)
        outside = number.is_nan() | (number != number.floor())
    if column.low is not None:
        outside = outside | (value < column.low)
    if column.high is not None:
        outside = outside | (value > column.high)
    if column.date:
        text = value.cast(pl.Int64, strict=False).cast(pl.String)
        outside = outside | text.str.to_date("%Y%m%d", strict=False).is_null()
    for code in column.missing:
        outside = outside & (value != code)
    return (wrong | outside.fill_null(False)).alias(name)


def _kept(name: str, column: Column) -> pl.Expr:
    value = pl.col(name)
    for code in column.missing:
        value = pl.when(value != code).then(value)
    return value.cast(column.dtype).alias(name)


def _wanted(column: Column) -> str:
    what = "a whole number" if column.dtype.is_integer() else "a number"
    what = "a date" if column.date else what
    if column.dtype == pl.String:
        return "expected text"
    if column.low is None:
        return f"expected {what}"
    codes = "".join(f" or {code} (missing)" for code in column.missing if code != 0)
    return f"expected {what} from {column.low} to {column.high}{codes}"


Part = Literal["first", "second", "random"]

URL = "https://zenodo.org/records/10439422/files"
LOGS: Mapping[Part, str] = {
    "first": "log_standard_4_08_to_4_21",
    "second": "log_standard_4_22_to_5_08",
    "random": "log_random_4_22_to_5_08",
}
SIDES = ("user_features", "video_features_basic", "video_features_statistic")
_NAME = re.compile(
    rf"(?P<table>{'|'.join([*LOGS.values(), *SIDES])})_(?P<release>\w+?)(_part(?P<part>\d+))?"
    r"\.(csv|parquet)"
)


class Count(NamedTuple):
    """Distinct users, distinct videos and rows of a log."""

    users: int
    videos: int
    rows: int


class Release(NamedTuple):
    """A version of KuaiRand.

    Attributes:
        archive: Name on Zenodo, record 10439422.
        md5: Published checksum of the archive.
        unpacked: Bytes of its files.
        standard: Counts of the two logs of recommended videos together.
        random: Counts of the log of random videos.
        parts: Number of files of each log of recommended videos.
    """

    archive: str
    md5: str
    unpacked: int
    standard: Count
    random: Count
    parts: int = 1

    def remote(self, url: str = URL) -> RemoteFile:
        """Return what is downloaded."""
        return RemoteFile(self.archive, f"{url}/{self.archive}", -1, "md5", self.md5)


RELEASES: Mapping[str, Release] = {
    "pure": Release(
        "KuaiRand-Pure.tar.gz",
        "0820331067a3784d9691136f772b35a7",
        194 * 10**6,
        Count(27_285, 7_551, 1_436_609),
        Count(27_285, 7_583, 1_186_059),
    ),
    "1k": Release(
        "KuaiRand-1K.tar.gz",
        "6b0b9c8222d67fcd4c676218edca3f1f",
        4_300 * 10**6,
        Count(1_000, 4_369_953, 11_713_045),
        Count(1_000, 7_388, 43_028),
    ),
    "27k": Release(
        "KuaiRand-27K.tar.gz",
        "3e3c799a24e2d23a4d2c757fbf9adf59",
        46_000 * 10**6,
        Count(27_285, 32_038_725, 322_278_385),
        Count(27_285, 7_583, 1_186_059),
        parts=2,
    ),
}
"""By the suffix of its files."""


class FileName(NamedTuple):
    """What the name of a file says: table, suffix of the release, number of the part from 1."""

    table: str
    release: str
    part: int


def parse_name(name: str) -> FileName | None:
    """Return the meaning of a file name, None if it is not one of KuaiRand's."""
    if match := _NAME.fullmatch(name):
        return FileName(match["table"], match["release"], int(match["part"] or 1))
    return None


def check_counts(release: str, which: str, found: Count, where: str, *, strict: bool) -> None:
    """Compare counts with the published ones; other releases, such as simulated ones, have none.

    Args:
        release: Suffix of the files.
        which: ``standard`` or ``random``.
        found: Counts of the log.
        where: Files, for the message.
        strict: Raise an error instead of a warning.

    Raises:
        GatesError: They differ, and ``strict`` is asked for.
    """
    check_option("which", which, ("standard", "random"))
    if release not in RELEASES:
        return
    expected: Count = getattr(RELEASES[release], which)
    differing = [
        f"{have:,} {name}, expected {want:,}"
        for name, have, want in zip(Count._fields, found, expected, strict=True)
        if have != want
    ]
    if not differing:
        return
    message = f"{where}: {'; '.join(differing)} as published; get KuaiRand-{release} again"
    if strict:
        raise GatesError(message)
    warnings.warn(message, stacklevel=2)


def download_release(
    release: str,
    folder: str | Path,
    *,
    url: str = URL,
    notify: Callable[[str], object] = lambda _: None,
    pause: float = 1.0,
) -> Path:
    """Download and unpack a release; continue where an earlier call stopped.

    Args:
        release: ``pure`` (194 MB unpacked), ``1k`` (4.3 GB) or ``27k`` (46 GB).
        folder: Where ``KuaiRand-…/data`` goes.
        url: Folder of the archives.
        notify: Called with a line before the download.
        pause: Seconds before a broken connection is tried again, doubled each time.

    Returns:
        The folder with the files.

    Raises:
        GatesError: The release is unknown, the disk too small, the server refuses, or the checksum
            is wrong twice.
    """
    check_option("release", release, RELEASES, GatesError)
    release_facts, folder = RELEASES[release], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / release_facts.archive.removesuffix(".tar.gz") / "data"
    if not data.exists() and release_facts.unpacked > (free := shutil.disk_usage(folder).free):
        raise GatesError(
            f"{folder} has {free / 1e9:.1f} GB free and KuaiRand-{release} needs "
            f"{release_facts.unpacked / 1e9:.1f} GB; choose another folder or a smaller release"
        )
    if not data.exists():
        notify(f"{release_facts.archive}, {release_facts.unpacked / 1e6:,.0f} MB unpacked")
    download_and_unpack([release_facts.remote(url)], folder, pause=pause)
    if not data.is_dir():
        raise GatesError(
            f"{release_facts.archive} has no folder {data.relative_to(folder)}; get it again"
        )
    return data
