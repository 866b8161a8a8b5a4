"""Radiosonde text: 21 columns of numbers a level, named by date, site and station.

Columns: record, pressure (hPa), temperature and dewpoint (deg C), relative humidity (%), wind
eastward and northward (m s-1), its speed and direction, ascent, longitude, latitude, three angles,
altitude (geopotential m), and six quality flags: 1 good, 2 doubtful, 3 bad, 4 estimated, 9 missing,
99 not checked. 999 and 9999 stand for missing values.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from weather.observations.decoded import PROFILE, Decoded
from weather.observations.readers.result import Found, read_lines
from weather.variables import standard_height

NAME = re.compile(r"(?P<date>\d{10})_\d+_(?P<station>\w+?)_raob", re.IGNORECASE)
COLUMNS = {
    1: "level_hpa", 2: "temperature", 3: "dewpoint", 4: "relative_humidity", 5: "u", 6: "v",
    7: "wind_speed", 8: "wind_direction", 10: "longitude", 11: "latitude", 14: "height",
}  # fmt: skip
FLAGS = {
    16: ("temperature",),
    17: ("dewpoint", "relative_humidity"),
    18: ("u", "v", "wind_speed", "wind_direction"),
    19: ("u", "v", "wind_speed", "wind_direction"),
}
"""Quantities that the flags of temperature, humidity and wind speak about; the first is of
pressure, the last of ascent."""

NUM_COLUMNS = 21
MISSING = (999.0, 9999.0, 99999.0)
POOR = (2.0, 3.0)
PRESSURE, ALTITUDE = 1, 14
SOUND_HPA, UNLIKE_STANDARD_M = 1200.0, 1000.0


def is_sonde_line(line: str) -> bool:
    """Return whether a line has the layout of a level."""
    words = line.split()
    return len(words) == NUM_COLUMNS and all(_is_number(word) for word in words)


def read_sonde_text(path: Path) -> Found:
    """Read one sounding, whose time and station are in the name of the file.

    Raises:
        GatesError: The name holds neither, or lines are partially written.
    """
    match = NAME.search(path.name)
    if match is None:
        raise GatesError(
            "its name holds no date and station, expected such as 2009022800_001_KSGF_raob.txt; "
            "rename it"
        )
    try:
        time = pd.to_datetime(match["date"], format="%Y%m%d%H")
    except ValueError as error:
        raise GatesError(f"{match['date']} in its name is no date; rename it") from error
    lines = [line for line in read_lines(path) if line.strip()]
    good = [line for line in lines if is_sonde_line(line)]
    values = np.array([line.split() for line in good], dtype=np.float64).reshape(-1, NUM_COLUMNS)
    data, flags = values[:, :15].copy(), values[:, 15:]
    data[_missing(data)] = np.nan
    wide = pd.DataFrame({name: data[:, column] for column, name in COLUMNS.items()})
    wide["temperature"] += 273.15
    wide["dewpoint"] += 273.15
    wide["relative_humidity"] /= 100
    wide = wide.assign(time=time, station=match["station"], sounding=0.0)
    decoded = Decoded("radiosonde", wide)
    if other := len(lines) - len(good):
        decoded.rejected["partially written lines"] += other
    _check_levels(decoded, flags)
    return Found.of(decoded)


def _missing(data: np.ndarray) -> np.ndarray:
    """Return which values stand for missing ones; 999 hPa and some heights are sound."""
    missing = np.isin(data, MISSING)
    missing[:, PRESSURE] &= data[:, PRESSURE] > SOUND_HPA
    with np.errstate(invalid="ignore"):
        standard = standard_height(np.clip(data[:, PRESSURE], 1.0, SOUND_HPA))
    missing[:, ALTITUDE] &= np.abs(data[:, ALTITUDE] - standard) > UNLIKE_STANDARD_M
    return missing


def _check_levels(decoded: Decoded, flags: np.ndarray) -> None:
    """Reject what is flagged or has no pressure."""
    decoded.reject(np.isin(flags[:, 0], POOR), PROFILE, "flagged in the file")
    for column, names in FLAGS.items():
        decoded.reject(np.isin(flags[:, column - 15], POOR), names, "flagged in the file")
    decoded.reject(decoded.wide["level_hpa"].isna(), PROFILE, "level without pressure")


def _is_number(word: str) -> bool:
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False
