"""Tables of reports of a long period, read when their time comes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from harness.files import sha256, short_digest
from weather.observations.table import OUT_OF_RANGE, ObservationTable
from weather.progress import Progress, silent

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
            for one in paths:
                frame = self._table(one).frame
                flagged = frame["qc"] == OUT_OF_RANGE
                self.flagged += int(flagged.sum())
                self.count += len(frame)
                for name, usable in (~flagged).groupby(frame["variable"]).any().items():
                    good[str(name)] = good.get(str(name), False) or bool(usable)
                if len(frame):
                    first, last = frame["time"].min(), frame["time"].max()
                    self._files.append(_File(one, first, last, sha256(one)))
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
        return np.datetime64(max(one.last for one in self._files), "ns")

    @property
    def digest(self) -> str:
        """SHA-256 of the table, or of the hashes of all tables."""
        hashes = [one.sha256 for one in self._files]
        return hashes[0] if len(hashes) == 1 else short_digest(hashes, 64)

    def around(self, time: np.datetime64, hours: float) -> ObservationTable:
        """Return the tables that may hold reports within some hours of a time."""
        center, half = pd.Timestamp(time), pd.Timedelta(hours=hours)
        found = [
            self._table(one.path).frame
            for one in self._files
            if one.first < center + half and one.last >= center - half
        ]
        if not found:
            return ObservationTable.empty()
        return ObservationTable(
            found[0] if len(found) == 1 else pd.concat(found, ignore_index=True)
        )

    def tables(self) -> Iterator[ObservationTable]:
        """Yield every table."""
        for one in self._files:
            yield self._table(one.path)

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
    found = [one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file()]
    hidden = [one for one in found if any(p.startswith(".") for p in one.relative_to(path).parts)]
    found = sorted(set(found) - set(hidden))
    if not found:
        raise GatesError(
            f"{path} holds no table ({' or '.join(SUFFIXES)}): make one of observation files with "
            "`gates weather ingest`"
        )
    return found
