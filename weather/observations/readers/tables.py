"""Tables that have the canonical columns already, CSV or Parquet; errors may be left out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from weather.observations.errors import observation_error
from weather.observations.readers.metar_parquet import read_parquet
from weather.observations.readers.result import Found
from weather.observations.table import COLUMNS, DEFAULTS
from weather.variables import VARIABLES

REQUIRED = tuple(name for name in COLUMNS if name not in DEFAULTS and name != "error")


def read_csv_table(path: Path) -> Found:
    """Read a table as CSV, see `read_table`."""
    try:
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
        found = ", ".join(map(str, frame.columns[:8]))
        raise GatesError(f"table lacks the column {', '.join(absent)}, found {found}; rename it")
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
