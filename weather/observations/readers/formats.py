"""Which format a file has, by its content, and tables that have the canonical columns already."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from harness.files.texts import check_cells
from weather.observations.decoded import Found
from weather.observations.readers.bufr import START, read_bufr
from weather.observations.readers.metar import (
    is_metar,
    is_metar_line,
    read_metar_parquet,
    read_metar_text,
    read_parquet,
)
from weather.observations.readers.soundings import (
    is_igra_line,
    is_sonde_line,
    read_igra,
    read_sonde_text,
)
from weather.observations.report_table import (
    COLUMNS,
    DEFAULTS,
    SEARCHED,
    Period,
    is_blank,
    observation_error,
)
from weather.variables import VARIABLES

REQUIRED = tuple(name for name in COLUMNS if name not in DEFAULTS and name != "error")


def read_csv_table(path: Path) -> Found:
    """Read a table as CSV, see `read_table`."""
    try:
        check_cells(path)
        frame = pd.read_csv(path)
    except (ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(f"unreadable CSV ({reason}); expected a header and rows") from error
    return _checked(frame)


def read_parquet_table(path: Path) -> Found:
    """Read a table as Parquet, see `read_csv_table`."""
    return _checked(read_parquet(path))


def _checked(frame: pd.DataFrame) -> Found:
    """Complete a table, and reject rows that a quality flag or a missing value excludes.

    Raises:
        GatesError: Columns are missing, or hold no numbers.
    """
    if absent := [name for name in REQUIRED if name not in frame]:
        columns = ", ".join(map(str, frame.columns[:8]))
        raise GatesError(f"table lacks the column {', '.join(absent)}, found {columns}; rename it")
    reports, rejected = len(frame), Counter[str]()
    frame = frame.reset_index(drop=True)
    for name in ("latitude", "longitude", "value", "level_hpa", "error"):
        if name in frame and not pd.api.types.is_numeric_dtype(frame[name]):
            numbers = pd.to_numeric(frame[name], errors="coerce")
            rejected["text in place of a number"] += int(
                (numbers.isna() & frame[name].notna()).sum()
            )
            frame = frame[numbers.notna() | frame[name].isna()].assign(**{name: numbers})
    if "qc" in frame:
        flagged = pd.to_numeric(frame["qc"], errors="coerce").fillna(0) != 0
        rejected["flagged in the file"] += int(flagged.sum())
        frame = frame[~flagged]
    if "source" not in frame:
        frame = frame.assign(source="table")
    return Found(_with_errors(frame), reports, +rejected)


def _with_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Add an error where none is stated, in the unit of the value."""
    stated = frame["error"] if "error" in frame else pd.Series(np.nan, frame.index)
    level = frame["level_hpa"] if "level_hpa" in frame else pd.Series(np.nan, frame.index)
    units = frame["units"] if "units" in frame else pd.Series("", frame.index)
    names, units = frame["variable"].astype(str), units.fillna("").astype(str)
    error = stated.astype(np.float64).copy()
    for name, unit in set(zip(names, units, strict=True)):
        rows = (names == name) & (units == unit) & stated.isna()
        if name in VARIABLES and rows.any():
            factor = (VARIABLES[name].conversion(unit) if unit.strip() else None) or (1.0, 0.0)
            error[rows] = observation_error(name, level[rows].to_numpy(np.float64)) / factor[0]
    return frame.assign(error=error)


FIRST_LINES = 20
FIELDS = "model fields on a grid, no reports"


class Content(NamedTuple):
    """A format and what was read."""

    format: str
    found: Found


class NoReportsError(GatesError):
    """A file is sound, but of a kind that holds no observations."""


def read_file(path: Path, period: Period) -> Content:
    """Find the format of a file, and read it.

    Args:
        path: The file.
        period: Soundings of other times may be left out; all else is read.

    Raises:
        NoReportsError: The file holds something else than observations.
        GatesError: It is empty, damaged or unknown; without its name, which the caller adds.
    """
    start = _start(path)
    if is_blank(start):
        raise GatesError("empty file")
    if start.startswith(b"PAR1"):
        return _parquet(path)
    if start.startswith(b"\x89HDF"):
        return _hdf(path)
    if start.startswith(b"CDF"):
        raise NoReportsError(f"NetCDF-3: {FIELDS}; IODA is NetCDF-4")
    if start.startswith(b"GRIB"):
        raise NoReportsError(f"GRIB: {FIELDS}")
    if START in start:
        return Content("BUFR", read_bufr(path))
    if start.startswith(b"PK"):
        return _archive(path, period)
    return _text(path, start, period)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(SEARCHED)
    except OSError as error:
        raise GatesError(f"cannot be opened: {error.strerror}") from error


def _parquet(path: Path) -> Content:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise GatesError("damaged or truncated Parquet; copy it again") from error
    if is_metar(columns):
        return Content("METAR parquet", read_metar_parquet(path))
    return Content("table", read_parquet_table(path))


def _hdf(path: Path) -> Content:
    import h5py

    from weather.observations.readers.ioda import is_ioda, read_ioda

    try:
        with h5py.File(path) as file:
            ioda, names = is_ioda(file), list(file)
    except (OSError, RuntimeError) as error:
        raise GatesError("damaged or truncated NetCDF or HDF5; copy it again") from error
    if not ioda:
        if {"latitude", "longitude"} <= set(names) or {"lat", "lon"} <= set(names):
            raise NoReportsError(f"NetCDF: {FIELDS}")
        raise GatesError("NetCDF or HDF5 without the groups MetaData and ObsValue of IODA")
    return Content("IODA", read_ioda(path))


def _archive(path: Path, period: Period) -> Content:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise GatesError("damaged archive; copy it again") from error
    if len(names) == 1 and names[0].endswith(".txt"):
        return Content("IGRA-2", read_igra(path, period))
    if names and all(name.endswith(".npy") for name in names):
        raise NoReportsError(f"NumPy arrays: {FIELDS}")
    raise GatesError(f"archive of {len(names)} files, expected one of IGRA-2; unpack it")


def _text(path: Path, start: bytes, period: Period) -> Content:
    if b"\0" in start:
        raise GatesError(
            "unknown binary format; docs/reference/observations.md lists those that are read"
        )
    lines = start.decode("utf-8", errors="replace").splitlines()
    lines = [line for line in lines if line.strip()][:FIRST_LINES]
    if is_igra_line(lines[0]):
        return Content("IGRA-2", read_igra(path, period))
    if any(is_sonde_line(line) for line in lines):
        return Content("sonde text", read_sonde_text(path))
    if any(is_metar_line(line) for line in lines):
        return Content("METAR text", read_metar_text(path))
    if path.suffix.lower() == ".csv":
        return Content("table", read_csv_table(path))
    if all(_is_site(line) for line in lines) or path.suffix.lower() in (".md", ".html", ".pdf"):
        raise NoReportsError("text without reports")
    raise GatesError("unknown format; see docs/reference/observations.md for those that are read")


def _is_site(line: str) -> bool:
    """Return whether a line is number, name and place of a site."""
    words = line.split()
    try:
        return len(words) == 4 and words[0].isdigit() and abs(float(words[2])) <= 90
    except ValueError:
        return False
