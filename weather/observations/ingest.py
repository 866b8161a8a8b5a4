"""Observation files of any format, with an account of each, and tables of a long period."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from harness.files import sha256, short_digest
from weather.observations.decoded import Found
from weather.observations.readers.formats import NoReportsError, read_file
from weather.observations.report_table import OUT_OF_RANGE, ObservationTable, Period
from weather.progress import Progress, silent

SAME = ["time", "latitude", "longitude", "level_hpa", "variable", "station", "source"]
"""Columns in which two values of one report agree."""


@dataclass(frozen=True)
class Account:
    """What became of one file.

    Attributes:
        path: The file.
        format: Its format, empty if none was found.
        reports: Reports that it holds: of a station at a time, or a level of a sounding.
        kept: Values stored.
        rejected: Values that were not, by reason.
        note: Why nothing was read, or what else is to be said.
        failed: Whether it should have been read and could not.
    """

    path: Path
    format: str = ""
    reports: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    note: str = ""
    failed: bool = False

    @property
    def why(self) -> str:
        """Reasons in one line, the most frequent first."""
        listed = [f"{count:,} {reason}" for reason, count in self.rejected.most_common()]
        return "; ".join([*listed, self.note] if self.note else listed)


class Ingested(NamedTuple):
    """The table of all files, in the order of time, and the account of each."""

    table: ObservationTable
    files: list[Account]


def ingest(
    paths: Sequence[Path], period: Period | None = None, progress: Progress = silent
) -> Ingested:
    """Read files of any format; one that cannot be read costs itself alone.

    Args:
        paths: Files.
        period: Values of other times are rejected.
        progress: Called with the number of files.

    Raises:
        GatesError: No value of any file is left.
    """
    period = period or Period()
    tables: list[pd.DataFrame] = []
    files: list[Account] = []
    spans: list[pd.Series] = []
    with progress("reading", len(paths)) as tick:
        for path in paths:
            frame, account, span = _read(path, period)
            tables.append(frame.assign(file=len(files)))
            files.append(account)
            spans.append(span)
            tick()
    joined, files = _without_copies(tables, files)
    if joined.empty:
        raise GatesError(_nothing(files, period, pd.concat(spans) if spans else None))
    return Ingested(ObservationTable.from_frame(joined), files)


def files_in(places: Iterable[Path], *, leave_out: Path | None = None) -> list[Path]:
    """Return the files of folders and their subfolders, sorted; hidden ones are passed over.

    Args:
        places: Folders or files.
        leave_out: File that is to be written, which may lie in a folder.

    Raises:
        GatesError: A place does not exist, or there is no file.
    """
    places, listing = list(places), list[Path]()
    for place in places:
        if not place.exists():
            raise GatesError(f"{place} does not exist: give a folder of observation files")
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        listing += [path for path in files if path.is_file() and not _hidden(path, place)]
    left = leave_out.resolve() if leave_out else None
    listing = [path for path in dict.fromkeys(listing) if path.resolve() != left]
    if not listing:
        raise GatesError(f"{', '.join(map(str, places))} holds no file: give observation files")
    return listing


def _hidden(path: Path, place: Path) -> bool:
    return any(
        part.startswith(".") or part.endswith(".zarr") for part in path.relative_to(place).parts
    )


def _read(path: Path, period: Period) -> tuple[pd.DataFrame, Account, pd.Series]:
    """Return the good values of a file, its account, and the first and last time in it."""
    nothing, span = ObservationTable.empty().frame, pd.Series([], dtype="datetime64[ns]")
    try:
        kind, decoded = read_file(path, period)
        checked, rejected, span = _checked(decoded, period)
    except NoReportsError as error:
        return nothing, Account(path, note=f"passed over: {error}"), span
    except GatesError as error:
        return (
            nothing,
            Account(path, note=_one_line(error).removeprefix(f"{path}, "), failed=True),
            span,
        )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # hostile content fails in ways that no reader foresees
        reason = f"{type(error).__name__} while reading: {_one_line(error)}"
        return nothing, Account(path, note=f"{reason}; copy it again", failed=True), span
    account = Account(path, kind, decoded.reports, len(checked), rejected, decoded.note)
    if not len(checked):
        account = replace(account, note=decoded.note or "nothing is left")
    return checked.frame, account, span


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _checked(decoded: Found, period: Period) -> tuple[ObservationTable, Counter[str], pd.Series]:
    """Reject values without time, place or number, of another time, or out of range.

    Raises:
        GatesError: The whole file is in a wrong unit or of an unknown variable.
    """
    frame, rejected = decoded.frame, Counter(decoded.rejected)
    if frame.empty:
        return ObservationTable.empty(), rejected, pd.Series([], dtype="datetime64[ns]")
    frame = frame.reset_index(drop=True)
    times = pd.to_datetime(frame["time"], utc=True, format="ISO8601", errors="coerce")
    frame = frame.assign(time=times.dt.tz_localize(None).astype("datetime64[ns]"))
    level = frame["level_hpa"] if "level_hpa" in frame else pd.Series(np.nan, frame.index)
    for good, reason in (
        (frame["time"].notna(), "without time"),
        (frame["latitude"].between(-90, 90), "without latitude"),
        (frame["longitude"].between(-180, 360), "without longitude"),
        (np.isfinite(frame["value"]), "without value"),
        (np.isfinite(frame["error"]) & (frame["error"] > 0), "without error"),
        (~(level <= 0), "of impossible pressure"),
    ):
        frame = _keep(frame, good, reason, rejected)
    span = frame["time"].agg(["min", "max"]) if len(frame) else frame["time"]
    frame = _keep(
        frame,
        pd.Series(period.holds(frame["time"]), frame.index, dtype=bool),
        "of another time",
        rejected,
    )
    table = ObservationTable.from_frame(frame, flag_out_of_range=True)
    outside = table.frame["qc"] == OUT_OF_RANGE
    rejected["out of range"] += int(outside.sum())
    return ObservationTable.from_frame(table.frame[~outside]), +rejected, span


def _keep(
    frame: pd.DataFrame, good: pd.Series, reason: str, rejected: Counter[str]
) -> pd.DataFrame:
    """Return the rows of a frame that are good, by their labels, and count the others."""
    good = good.reindex(frame.index)
    rejected[reason] += int((~good).sum())
    return frame[good]


def _without_copies(
    tables: Sequence[pd.DataFrame], files: Sequence[Account]
) -> tuple[pd.DataFrame, list[Account]]:
    """Join the values of all files; of several of one report the last stays, a correction."""
    if not tables:
        return pd.DataFrame(), list(files)
    joined = pd.concat(tables, ignore_index=True)
    copies = joined.duplicated(SAME, keep="last")
    counts = joined["file"][copies].value_counts()
    accounted = []
    for number, account in enumerate(files):
        copied = int(counts.get(number, 0))
        accounted.append(
            replace(
                account,
                kept=account.kept - copied,
                rejected=account.rejected + Counter({"reported again": copied}),
            )
        )
    left = joined[~copies].sort_values(["time", "station", "variable"], kind="stable")
    return left.drop(columns="file").reset_index(drop=True), accounted


def _nothing(files: Sequence[Account], period: Period, times: pd.Series | None) -> str:
    """Say why no value is left."""
    timely = times.dropna() if times is not None else pd.Series([], dtype="datetime64[ns]")
    if len(timely):
        return (
            f"no value of {len(files)} files is left; they are of {timely.min():%Y-%m-%dT%H:%M} "
            f"to {timely.max():%Y-%m-%dT%H:%M}, asked for is {period}: nothing is written, give "
            "other files or another period"
        )
    reasons = "; ".join(f"{file.path.name}: {file.why}" for file in files[:3])
    return f"no file holds an observation ({reasons}): nothing is written, give other files"


SUFFIXES = (".parquet", ".csv")
KEPT = 4  # tables in memory


class _File(NamedTuple):
    """A table, the times of its first and last report, and its SHA-256."""

    path: Path
    first: pd.Timestamp
    last: pd.Timestamp
    sha256: str


class ReportArchive:
    """One table or a folder of them, of which only those around a time are in memory.

    Every file is read and checked once at the beginning.

    Args:
        path: A table as `gates weather ingest` writes it, or a folder of such tables.
        progress: Shows how far the checks are.

    Attributes:
        flagged: Reports that are out of range or flagged.
        count: All reports.

    Raises:
        GatesError: A table is faulty, there is none or no report, or all reports of a variable are
            out of range.
    """

    def __init__(self, path: Path, progress: Progress = silent) -> None:
        self.path = path
        self._kept: OrderedDict[Path, ObservationTable] = OrderedDict()
        self._files: list[_File] = []
        self.flagged = self.count = 0
        good: dict[str, bool] = {}
        paths = _tables(path)
        with progress("checking reports", len(paths)) as tick:
            for file_path in paths:
                frame = self._table(file_path).frame
                flagged = frame["qc"] == OUT_OF_RANGE
                self.flagged += int(flagged.sum())
                self.count += len(frame)
                for name, usable in (~flagged).groupby(frame["variable"]).any().items():
                    good[str(name)] = good.get(str(name), False) or bool(usable)
                if len(frame):
                    first, last = frame["time"].min(), frame["time"].max()
                    self._files.append(_File(file_path, first, last, sha256(file_path)))
                tick()
        if not self.count:
            raise GatesError(f"{path} holds no reports, expected some: nothing is written")
        for name, usable in good.items():
            if not usable:
                raise GatesError(
                    f"{path}: every report of {name} is out of range or flagged by qc, expected "
                    "SI units: convert it, state its unit in a column units, or drop its rows"
                )

    @property
    def last(self) -> np.datetime64:
        """Time of the last report."""
        return np.datetime64(max(file.last for file in self._files), "ns")

    @property
    def digest(self) -> str:
        """SHA-256 of the table, or of the hashes of all tables."""
        hashes = [file.sha256 for file in self._files]
        return hashes[0] if len(hashes) == 1 else short_digest(hashes, 64)

    def around(self, time: np.datetime64, hours: float) -> ObservationTable:
        """Return the tables that may hold reports within some hours of a time."""
        center, half = pd.Timestamp(time), pd.Timedelta(hours=hours)
        frames = [
            self._table(file.path).frame
            for file in self._files
            if file.first < center + half and file.last >= center - half
        ]
        if not frames:
            return ObservationTable.empty()
        return ObservationTable(
            frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)
        )

    def tables(self) -> Iterator[ObservationTable]:
        """Yield every table."""
        for file in self._files:
            yield self._table(file.path)

    def _table(self, path: Path) -> ObservationTable:
        if path not in self._kept:
            self._kept[path] = ObservationTable.read(path, flag_out_of_range=True)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(path)
        return self._kept[path]


def _tables(path: Path) -> list[Path]:
    """Return the tables of a folder and its subfolders, or a table alone."""
    if not path.is_dir():
        return [path]
    tables = [
        file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    hidden = [
        file for file in tables if any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    tables = sorted(set(tables) - set(hidden))
    if not tables:
        raise GatesError(
            f"{path} holds no table ({' or '.join(SUFFIXES)}): make one of observation files with "
            "`gates weather ingest`"
        )
    return tables
