"""The files of a release, or a single log, found and read part by part, faults with their line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from core_gates.errors import GatesError
from harness.files.texts import not_utf8
from video_multitask.history import PREFIX
from video_multitask.kuairand.releases import (
    LOG,
    LOGS,
    OPTIONAL,
    RELEASES,
    USERS,
    VIDEOS,
    Column,
    Columns,
    Count,
    Part,
    check_counts,
    check_keys,
    checked,
    parse_name,
)

ROWS_AT_ONCE = 2**18
_BYTES_AT_ONCE = 2**23
_PLACE = re.compile(r"In CSV column #(\d+): Row #(\d+): .*invalid value '(.*)'", re.DOTALL)
_FIELDS = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
SIDES = ("user_features", "video_features_basic")
ALL: tuple[Part, ...] = ("first", "second", "random")
OVERVIEWS: Mapping[str, tuple[Part, ...]] = {"standard": ("first", "second"), "random": ("random",)}
MADE = (
    "has_duration", "complete", "replay", "skip", "comment_stay",
    "hour", "weekday", "video_age_days", "first_tag",
)  # fmt: skip
"""Columns that are made of others, whatever the log has under these names."""


def read_table(
    path: Path,
    columns: Columns,
    *,
    optional: Sequence[str] = (),
    keep: Sequence[str] = (),
    drop_invalid: bool = False,
) -> Iterator[pl.DataFrame]:
    """Yield a table in parts of bounded size, in the order of the file.

    The order of the columns in the file does not matter; further ones are left out. Line ends may
    be those of Windows, quoted fields may contain commas. Codes of missing values become null.

    Args:
        path: A CSV file with a header, or a Parquet file.
        columns: Columns that are read.
        optional: Those among them that may be absent.
        keep: Further columns, returned as they are; absent ones are passed over.
        drop_invalid: Leave out rows with values that are empty or out of range, instead of
            refusing the file.

    Raises:
        GatesError: The file is missing, empty, cut off, lacks a column or has a wrong value; the
            line counts from 1, the header's.
    """
    if not path.is_file():
        raise GatesError(f"{path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise GatesError(f"{path} is empty; a header and rows were expected, get it again")
    is_csv = path.suffix != ".parquet"
    header = _header(path)
    _check_header(path, header, columns, optional)
    wanted = [name for name in columns if name in header]
    wanted += [name for name in keep if name in header and name not in columns]
    parts = _csv_parts(path, header, wanted, columns) if is_csv else _parquet_parts(path, wanted)
    rows = 0
    for part in parts:
        first = rows + (2 if is_csv else 1)
        yield checked(part, columns, str(path), first, drop_invalid=drop_invalid)
        rows += len(part)
    if rows == 0:
        raise GatesError(f"{path} has a header and no rows; get it again")


def _check_header(path: Path, header: list[str], columns: Columns, optional: Sequence[str]) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise GatesError(f"{path}, line 1: column {twice[0]!r} occurs twice; remove one of them")
    missing = [name for name in columns if name not in header and name not in optional]
    if missing:
        raise GatesError(
            f"{path}, line 1: columns {', '.join(missing[:5])} are missing; found "
            f"{', '.join(header[:8])}{' …' if len(header) > 8 else ''}"
        )


def _csv_parts(
    path: Path, header: list[str], wanted: list[str], columns: Columns
) -> Iterator[pl.DataFrame]:
    types = {name: _arrow_type(columns[name]) for name in wanted if name in columns}
    try:
        reader = pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=_BYTES_AT_ONCE, column_names=header, skip_rows=1
            ),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=wanted, strings_can_be_null=True,
                null_values=[""], quoted_strings_can_be_null=True,
            ),
        )  # fmt: skip
        for batch in reader:
            yield pl.DataFrame(pl.from_arrow(batch))
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):
            return
        raise GatesError(_csv_fault(path, header, str(error))) from error


def _arrow_type(column: Column) -> pa.DataType:
    """Return the type a field is parsed to: next to blanks, pandas writes whole numbers as 1.0."""
    if column.dtype == pl.String:
        return pa.string()
    return pa.float64() if column.dtype.is_float() or column.blank else pa.int64()


def _csv_fault(path: Path, header: list[str], message: str) -> str:
    """Return what pyarrow found, with the name of the column and the line."""
    if place := _PLACE.search(message):
        column, line, value = header[int(place[1])], int(place[2]), place[3]
        kind = "whole number" if "int64" in message else "number"
        return f"{path}, line {line}, column {column}: {value!r} is not a {kind}; correct it"
    if fields := _FIELDS.search(message):
        return (
            f"{path}, line {fields[1]}: {fields[3]} fields, expected the {fields[2]} of the "
            "header; the file may be cut off, get it again"
        )
    return f"{path} cannot be read as CSV: {message.splitlines()[0]}; get it again"


def _parquet_parts(path: Path, wanted: list[str]) -> Iterator[pl.DataFrame]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
                yield pl.DataFrame(pl.from_arrow(batch)).select(wanted)
    except (pa.ArrowInvalid, OSError) as error:
        raise GatesError(
            f"{path} is damaged ({str(error).splitlines()[0]}); get it again"
        ) from error


def find_files(folder: Path) -> tuple[str, dict[str, list[Path]]]:
    """Return the release of a folder and its files by table, in the order of their parts.

    Args:
        folder: With the files, with ``data`` in it, or with ``KuaiRand-…/data`` in it.

    Raises:
        GatesError: There are none, some are missing, or two releases are mixed.
    """
    places = [p for p in (folder, folder / "data", *sorted(folder.glob("KuaiRand-*/data")))
              if p.is_dir()]  # fmt: skip
    for place in places:
        named = {path: name for path in sorted(place.iterdir()) if (name := parse_name(path.name))}
        if named:
            break
    else:
        raise GatesError(
            f"{folder} holds no log of KuaiRand, such as {LOGS['first']}_pure.csv; name the folder "
            "that the archive was unpacked to"
        )
    releases = sorted({name.release for name in named.values()})
    if len(releases) > 1:
        raise GatesError(
            f"{place} mixes the releases {', '.join(releases)}, whose ids differ; keep one of them"
        )
    files: dict[str, list[Path]] = {}
    for path, name in sorted(named.items(), key=lambda item: (item[1].table, item[1].part)):
        files.setdefault(name.table, []).append(path)
        if len(files[name.table]) != name.part:
            raise GatesError(
                f"{path}: part {name.part} comes after {len(files[name.table]) - 1} parts; get "
                "the missing one, or remove its copy in another format"
            )
    _check_complete(place, releases[0], files)
    return releases[0], files


def _check_complete(folder: Path, release: str, files: dict[str, list[Path]]) -> None:
    """Refuse a published release that lacks logs, and any other without the first of them."""
    published = RELEASES.get(release)
    needed: tuple[Part, ...] = ("first", "second", "random") if published else ("first",)
    for part in needed:
        wanted = published.parts if published and part != "random" else 1
        if (count := len(files.get(LOGS[part], ()))) < wanted:
            raise GatesError(
                f"{folder} has {count} of {wanted} files {LOGS[part]}_{release}; unpack the whole "
                "archive"
            )


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
        keep: Further columns of the log to keep, such as ``position``, or `further`.
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

    def keep_further(self) -> tuple[list[str], list[str]]:
        """Keep the further columns of the logs, and return those, and what is left out.

        Columns that preparing makes are neither.
        """
        free, taken = self.further()
        self.keep = tuple(n for n in free if n not in MADE and not n.startswith(PREFIX))
        return list(self.keep), [*taken, *(n for n in free if n.startswith(PREFIX))]

    def has(self, part: Part) -> bool:
        """Return whether there is a log."""
        return LOGS[part] in self._files

    def users(self) -> pl.DataFrame | None:
        """Return the user table, None for a single log.

        Raises:
            GatesError: The file has a fault, or a user occurs twice.
        """
        return self._side("user_features", USERS, "user_id")

    def videos(self) -> pl.DataFrame | None:
        """Return the table of basic video features, None for a single log.

        Raises:
            GatesError: The file has a fault, or a video occurs twice.
        """
        return self._side("video_features_basic", VIDEOS, "video_id")

    def overviews(self, *, strict: bool = False) -> Iterator[tuple[str, Overview]]:
        """Yield the name and the `overview` of each log that exists."""
        for which, parts in OVERVIEWS.items():
            if any(self.has(part) for part in parts):
                yield which, self.overview(which, strict=strict)

    def overview(self, which: str = "standard", *, strict: bool = False) -> Overview:
        """Read a log once and compare its counts with the published ones.

        Args:
            which: ``standard`` or ``random``.
            strict: Raise an error where counts differ, instead of a warning.

        Raises:
            GatesError: A file has a fault; counts differ and ``strict`` is asked for.
        """
        parts = OVERVIEWS["random" if which == "random" else "standard"]
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
            dtype = rows.schema[name]
            wanted = self._types.setdefault(name, pl.String() if dtype == pl.Null else dtype)
            try:
                rows = rows.with_columns(pl.col(name).cast(wanted))
            except pl.exceptions.InvalidOperationError as error:
                raise GatesError(
                    f"{path}: column {name!r} holds {dtype}, but {wanted} in the file before: "
                    "correct or remove it"
                ) from error
        return rows

    def _side(self, name: str, columns: Columns, key: str) -> pl.DataFrame | None:
        paths = self._files.get(name)
        if not paths:
            return None
        read = partial(read_table, columns=columns, drop_invalid=self._drop_invalid)
        table = pl.concat([part for path in paths for part in read(path)])
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
            return list(pq.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            said = str(error).splitlines()[0]
            raise GatesError(
                f"{path} cannot be read: it is not a complete Parquet file ({said}); repair or "
                "remove it"
            ) from error
    with path.open("rb") as file:
        first = file.readline()
    try:
        return [name.strip() for name in next(csv.reader([first.decode("utf-8-sig")]), [])]
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
