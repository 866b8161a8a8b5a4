"""The files of a release, or a single log, read part by part."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from recsys.data.table_files import not_utf8
from video_multitask.kuairand.checks import check_keys
from video_multitask.kuairand.columns import (
    LOG,
    OPTIONAL,
    USERS,
    VIDEOS,
    Columns,
)
from video_multitask.kuairand.files import find_files
from video_multitask.kuairand.releases import LOGS, Count, Part, check_counts
from video_multitask.kuairand.tables import read_table

SIDES = ("user_features", "video_features_basic")
ALL: tuple[Part, ...] = ("first", "second", "random")


class Overview(NamedTuple):
    """What a pass over a log found.

    Attributes:
        counts: Users, videos and rows.
        repeated: Rows that repeat user, video and time of the row before in the same part.
        unordered: Rows that are earlier than the row before.
        without_duration: Rows whose duration is missing.
    """

    counts: Count
    repeated: int
    unordered: int
    without_duration: int


class KuaiRand:
    """A release of KuaiRand, or a log in its format.

    Nothing is read before it is asked for, and logs come in parts of bounded size. Rows keep the
    order of the files, which is not that of time: sort before you depend on it.

    Args:
        path: The folder of a release, its ``data`` folder, or one log as CSV or Parquet.
        keep: Further columns of the log to keep, such as ``position``, or :meth:`further`.
        drop_invalid: Leave out rows with wrong values instead of refusing the file.

    Attributes:
        keep: Further columns of the log that are kept.
        release: Suffix of the files: ``pure``, ``1k``, ``27k`` or another; empty for a single log.

    Raises:
        GatesError: There is no such folder or log, or files are missing.
    """

    def __init__(
        self, path: str | Path, *, keep: Sequence[str] = (), drop_invalid: bool = False
    ) -> None:
        self.path = Path(path)
        self.keep, self._drop_invalid = tuple(keep), drop_invalid
        self._types: dict[str, pl.DataType] = {}
        self.release = ""
        self._files: dict[str, list[Path]] = {LOGS["first"]: [self.path]}
        if not self.path.exists():
            raise GatesError(
                f"{self.path} does not exist: name a KuaiRand folder or a log, or get one by "
                "`gates video prepare data/kuairand-pure --download pure --history 20 "
                "--output data/pure`"
            )
        if self.path.is_dir():
            self.release, self._files = find_files(self.path)

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        return [path for paths in self._files.values() for path in paths]

    def log(self, parts: Sequence[Part] = ALL) -> Iterator[pl.DataFrame]:
        """Yield rows of a log, file after file.

        Args:
            parts: ``first`` and ``second`` period of recommended videos, ``random`` videos.

        Raises:
            GatesError: A file has a fault; file, line and column are named.
        """
        optional = OPTIONAL if not self.release else ()
        for part in parts:
            for path in self._files.get(LOGS[part], ()):
                for rows in read_table(
                    path, LOG, optional=optional, keep=self.keep, drop_invalid=self._drop_invalid
                ):
                    yield self._alike(rows, path)

    def further(self) -> tuple[list[str], list[str]]:
        """Return columns of the logs beyond KuaiRand's: those that can be kept, and the others.

        The others are not in all logs, or another table has them, too.
        """
        logs = [p for name in LOGS.values() for p in self._files.get(name, ())]
        sides = [p for name in SIDES for p in self._files.get(name, ())]
        headers = [_header(path) for path in logs if path.is_file()]
        taken = {name for path in sides for name in _header(path)}
        names = dict.fromkeys(name for header in headers for name in header if name not in LOG)
        free = [
            name
            for name in names
            if name not in taken and all(name in header for header in headers)
        ]
        return free, [name for name in names if name not in free]

    def has(self, part: Part) -> bool:
        """Return whether there is a log."""
        return LOGS[part] in self._files

    def users(self) -> pl.DataFrame | None:
        """Return the user table, None for a single log.

        Raises:
            GatesError: The file has a fault, or a user occurs twice.
        """
        return self._side("user_features", read_users)

    def videos(self) -> pl.DataFrame | None:
        """Return the table of basic video features, None for a single log.

        Raises:
            GatesError: The file has a fault, or a video occurs twice.
        """
        return self._side("video_features_basic", read_videos)

    def overview(self, which: str = "standard", *, strict: bool = False) -> Overview:
        """Read a log once and compare its counts with the published ones.

        Args:
            which: ``standard`` or ``random``.
            strict: Raise an error where counts differ, instead of a warning.

        Raises:
            GatesError: A file has a fault; counts differ and ``strict`` is asked for.
        """
        parts: tuple[Part, ...] = ("random",) if which == "random" else ("first", "second")
        users, videos = _Distinct(), _Distinct()
        rows = repeated = unordered = without = 0
        last = -1
        for part in self.log(parts):
            users.add(part["user_id"])
            videos.add(part["video_id"])
            rows += len(part)
            time = part["time_ms"].to_numpy()
            unordered += int((np.diff(time, prepend=last) < 0).sum())
            keys = part.select("user_id", "video_id", "time_ms")
            repeated += len(keys) - keys.n_unique()
            without += part["duration_ms"].null_count()
            last = int(time[-1]) if len(time) else last
        count = Count(users.count(), videos.count(), rows)
        check_counts(self.release, which, count, str(self.path), strict=strict)
        return Overview(count, repeated, unordered, without)

    def _alike(self, rows: pl.DataFrame, path: Path) -> pl.DataFrame:
        """Return rows whose further columns have the types that they had first."""
        for name in self.keep:
            if name not in rows.columns:
                continue
            found = rows.schema[name]
            wanted = self._types.setdefault(name, pl.String() if found == pl.Null else found)
            try:
                rows = rows.with_columns(pl.col(name).cast(wanted))
            except pl.exceptions.InvalidOperationError as error:
                raise GatesError(
                    f"{path}: column {name!r} holds {found}, but {wanted} in the file before: "
                    "correct or remove it"
                ) from error
        return rows

    def _side(self, table: str, read: Callable[..., pl.DataFrame]) -> pl.DataFrame | None:
        paths = self._files.get(table, [])
        return read(*paths, drop_invalid=self._drop_invalid) if paths else None


def read_users(*paths: Path, drop_invalid: bool = False) -> pl.DataFrame:
    """Read a user table from its files, CSV or Parquet.

    Raises:
        GatesError: A file has a fault, or a user occurs twice.
    """
    return _side_table(paths, USERS, "user_id", drop_invalid)


def read_videos(*paths: Path, drop_invalid: bool = False) -> pl.DataFrame:
    """Read a table of basic video features from its files, CSV or Parquet.

    Raises:
        GatesError: A file has a fault, or a video occurs twice.
    """
    return _side_table(paths, VIDEOS, "video_id", drop_invalid)


def _side_table(
    paths: Sequence[Path], columns: Columns, key: str, drop_invalid: bool
) -> pl.DataFrame:
    parts = [p for path in paths for p in read_table(path, columns, drop_invalid=drop_invalid)]
    table = pl.concat(parts)
    check_keys(table, key, str(paths[0]))
    return table


class _Distinct:
    """Counts distinct ids from 0 in one byte per id."""

    def __init__(self) -> None:
        self._seen = np.zeros(2**16, dtype=bool)

    def add(self, ids: pl.Series) -> None:
        if not len(ids):
            return
        numbers = ids.to_numpy()
        if (size := int(numbers.max()) + 1) > len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(size, dtype=bool)])
        self._seen[numbers] = True

    def count(self) -> int:
        return int(self._seen.sum())


def _header(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        try:
            return list(pl.read_parquet_schema(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            said = str(error).splitlines()[0]
            raise GatesError(f"{path} cannot be read: {said}; repair or remove it") from error
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [name.strip() for name in next(csv.reader([file.readline()]), [])]
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
