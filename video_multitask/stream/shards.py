"""A log as Parquet files, one for each day, with a manifest of row groups and hashes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from core_gates.errors import GatesError, check_at_least
from harness.files import replacing, sha256, write_json

MANIFEST = "manifest.json"
FORMAT = 1
ROW_GROUP = 2**14


@dataclass(frozen=True)
class ShardFile:
    """A file of a day.

    Attributes:
        name: In the folder.
        date: As in the log, such as 20220408.
        random: Whether its videos were chosen at random.
        groups: Rows of each row group.
        size: Bytes.
        sha256: Of its content.
    """

    name: str
    date: int
    random: bool
    groups: tuple[int, ...]
    size: int
    sha256: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.groups)


class Group(NamedTuple):
    """A row group: name of its file, number in it, and rows."""

    file: str
    number: int
    rows: int


@dataclass(frozen=True)
class Shards:
    """A folder of Parquet files, days in ascending order, rows of each in time order.

    Attributes:
        folder: Where they are.
        files: Those that are read.
        columns: Name and type of each column.
        source: What the rows were made from.
    """

    folder: Path
    files: tuple[ShardFile, ...]
    columns: Mapping[str, str]
    source: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(file.rows for file in self.files)

    @property
    def groups(self) -> list[Group]:
        """Row groups in time order."""
        return [Group(f.name, k, rows) for f in self.files for k, rows in enumerate(f.groups)]

    def select(
        self, first: int | None = None, last: int | None = None, random: bool | None = None
    ) -> Shards:
        """Return the shards of some days.

        Args:
            first: First date, such as 20220408; the first one that exists if None.
            last: Last date; the last one that exists if None.
            random: Rows of random or of recommended videos alone; both if None.

        Raises:
            GatesError: No row is left.
        """
        chosen = tuple(
            file
            for file in self.files
            if (first is None or file.date >= first)
            and (last is None or file.date <= last)
            and (random is None or file.random == random)
        )
        if not chosen:
            days = [file.date for file in self.files]
            raise GatesError(
                f"{self.folder} has no rows from {first} to {last} with random={random}; its days "
                f"are {min(days)} … {max(days)}"
            )
        return dataclasses.replace(self, files=chosen)

    def read(self, group: Group, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Read a row group.

        Raises:
            GatesError: The file is damaged, or lacks a column.
        """
        path = self.folder / group.file
        try:
            with pq.ParquetFile(path) as file:
                wanted = None if columns is None else list(columns)
                table = file.read_row_group(group.number, columns=wanted, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise GatesError(f"{path} is damaged ({_line(error)}); prepare it again") from error
        frame = pl.DataFrame(pl.from_arrow(table))
        if columns is None:
            return frame
        if missing := [name for name in columns if name not in frame.columns]:
            raise GatesError(f"{path} lacks the columns {', '.join(missing[:5])}")
        return frame.select(columns)

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """Yield the rows in time order, row group after row group."""
        for group in self.groups:
            yield self.read(group, columns)


def write_shards(
    parts: Iterable[pl.DataFrame],
    folder: str | Path,
    *,
    row_group: int = ROW_GROUP,
    source: Mapping[str, Any] | None = None,
) -> Shards:
    """Write rows that come in time order; the folder is the old or the new one, nothing between.

    Rows with ``is_rand`` = 1 go into files for themselves, so that a split is a choice of files.
    ``date`` need not be the day of ``time_ms``: in KuaiRand, .7 % of rows differ.

    Args:
        parts: Rows with ``date`` and ``time_ms``, in any partition, which changes no byte.
        folder: It is replaced as a whole.
        row_group: Rows of a row group; each file may end with a smaller one.
        source: Plain values that describe where the rows come from.

    Raises:
        GatesError: There are no rows, or they are not in time order.
        ValueError: ``row_group`` is not positive.
    """
    check_at_least(1, row_group=row_group)
    folder = Path(folder)
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        writers: dict[tuple[int, bool], _Writer] = {}
        schema: dict[str, str] = {}
        latest = 0
        for part in parts:
            if not len(part):
                continue
            schema = schema or {name: str(dtype) for name, dtype in part.schema.items()}
            latest = _check_order(part, latest)
            for key, rows in _by_file(part):
                if key not in writers:
                    writers[key] = _Writer(temporary, *key, row_group)
                writers[key].write(rows)
        if not writers:
            raise GatesError(f"there are no rows to write to {folder}")
        files = [writers[key].close() for key in sorted(writers)]
        content = {
            "format": FORMAT,
            "rows": sum(file.rows for file in files),
            "columns": schema,
            "files": [dataclasses.asdict(file) for file in files],
            "source": dict(source or {}),
        }
        write_json(temporary / MANIFEST, content)
    return open_shards(folder)


def open_shards(folder: str | Path, *, verify: bool = False) -> Shards:
    """Open a folder of shards.

    Args:
        folder: Of `write_shards`.
        verify: Compare the hashes of all files; sizes are always compared.

    Raises:
        GatesError: There is no manifest, or a file is missing or another one than was written.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise GatesError(f"{folder} has no {MANIFEST}; name a folder that was prepared")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise GatesError(f"{path} has format {content['format']}, expected {FORMAT}")
        files = tuple(
            ShardFile(**{**file, "groups": tuple(file["groups"])}) for file in content["files"]
        )
        shards = Shards(folder, files, content["columns"], content["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise GatesError(f"{path} is not a manifest of shards: {_line(error)}") from error
    for file in shards.files:
        place = folder / file.name
        if not place.is_file():
            raise GatesError(f"{place} is missing, but listed in {MANIFEST}; prepare it again")
        if (size := place.stat().st_size) != file.size:
            raise GatesError(f"{place} has {size} bytes, expected {file.size}; prepare it again")
        if verify and (digest := sha256(place)) != file.sha256:
            raise GatesError(
                f"{place} has SHA-256 {digest[:12]}…, expected {file.sha256[:12]}…; "
                "prepare it again"
            )
    return shards


class _Writer:
    """Writes one file in row groups of fixed size."""

    def __init__(self, folder: Path, date: int, random: bool, rows: int) -> None:
        self.path = folder / f"{date}{'_random' if random else ''}.parquet"
        self.date, self.random, self.rows = date, random, rows
        self.groups: list[int] = []
        self._waiting: list[pl.DataFrame] = []
        self._file: pq.ParquetWriter | None = None

    def write(self, frame: pl.DataFrame) -> None:
        self._waiting.append(frame)
        if sum(map(len, self._waiting)) >= self.rows:
            joined = pl.concat(self._waiting)
            full = len(joined) // self.rows * self.rows
            for start in range(0, full, self.rows):
                self._group(joined[start : start + self.rows])
            self._waiting = [joined[full:]]

    def close(self) -> ShardFile:
        if rest := [frame for frame in self._waiting if len(frame)]:
            self._group(pl.concat(rest))
        assert self._file is not None
        self._file.close()
        size = self.path.stat().st_size
        return ShardFile(
            self.path.name, self.date, self.random, tuple(self.groups), size, sha256(self.path)
        )

    def _group(self, frame: pl.DataFrame) -> None:
        table = frame.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._file is None:
            self._file = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self._file.write_table(table, row_group_size=len(table))
        self.groups.append(len(table))


def _by_file(part: pl.DataFrame) -> Iterator[tuple[tuple[int, bool], pl.DataFrame]]:
    names = ["date", "is_rand"] if "is_rand" in part.columns else ["date"]
    for key, rows in part.partition_by(names, as_dict=True, maintain_order=True).items():
        yield (int(key[0]), bool(key[1]) if len(key) > 1 else False), rows


def _check_order(part: pl.DataFrame, latest: int) -> int:
    times = part["time_ms"]
    first, last = int(times[0]), int(times[-1])
    if first < latest or not times.is_sorted():
        raise GatesError(
            f"rows are not in time order, after {max(latest, first)} comes an earlier one; sort "
            "them by time_ms"
        )
    return last


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Period(NamedTuple):
    """Days of a log.

    Attributes:
        first: First date, such as 20220408.
        last: Last date.
        random: Rows of random or of recommended videos alone; both if None.
    """

    first: int
    last: int
    random: bool | None = None

    def of(self, shards: Shards) -> Shards:
        """Return the shards of these days.

        Raises:
            GatesError: There are none.
        """
        return shards.select(self.first, self.last, self.random)


class Periods(NamedTuple):
    """Days for training, validation and test."""

    train: Period
    validation: Period
    test: Period


def last_days(
    shards: Shards, validation: int = 2, test: int = 2, random: bool | None = None
) -> Periods:
    """Return periods that validate and test on the last days.

    Args:
        shards: Of the whole log.
        validation: Days for validation.
        test: Days for the test, after those for validation.
        random: Rows of random or of recommended videos alone; both if None.

    Raises:
        GatesError: No day is left for training.
        ValueError: A number is below 1.
    """
    check_at_least(1, validation=validation, test=test)
    days = sorted({file.date for file in shards.files})
    if len(days) <= validation + test:
        raise GatesError(
            f"{shards.folder} has {len(days)} days, of which {validation + test} validate and "
            "test; none is left for training"
        )
    train, rest = days[: -validation - test], days[-validation - test :]
    return Periods(
        Period(train[0], train[-1], random),
        Period(rest[0], rest[validation - 1], random),
        Period(rest[validation], rest[-1], random),
    )
