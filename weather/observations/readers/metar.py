"""METAR and SPECI reports: text as it was sent, or Parquet with the quality flags of MADIS."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from weather.observations.decoded import Decoded, Found, read_lines

LINE = re.compile(
    r"^.*?(?P<station>[A-Z][A-Z0-9]{3}) (?P<latitude>-?\d+\.\d+) (?P<longitude>-?\d+\.\d+)"
    r" (?P<seconds>\d{9,10}) \d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*?"
    r"(?P<report>(?:METAR|SPECI) .*)$"
)
WIND = re.compile(r" (\d{3}|VRB)(\d{2,3})(?:G\d{2,3})?(KT|MPS) ")
BODY = re.compile(r" (M?\d\d)/(M?\d\d)?(?: |$)")
TENTHS = re.compile(r" T([01])(\d{3})(?:([01])(\d{3}))?(?: |$)")
ALTIMETER = re.compile(r" (A|Q)(\d{4})(?: |$)")
SEA_LEVEL = re.compile(r" SLP(\d{3})(?: |$)")
INCH_OF_MERCURY = 3386.389  # Pa
KNOT = 0.514444
ZERO = 273.15


def is_metar_line(line: str) -> bool:
    """Return whether a line has the layout of these reports."""
    return LINE.match(line) is not None


def read_metar_text(path: Path) -> Found:
    """Read a file of reports; lines of another layout are counted, not read.

    Raises:
        GatesError: No line has the layout.
    """
    lines = [line for line in read_lines(path) if line.strip()]
    rows = list(_reports(lines))
    if not rows:
        raise GatesError(
            "no line holds a decoded METAR; its layout: docs/reference/observations.md"
        )
    decoded = Decoded("metar", pd.DataFrame(rows))
    decoded.wide["time"] = pd.to_datetime(decoded.wide["time"], unit="s")
    if other := len(lines) - len(rows):
        decoded.rejected["lines of another layout"] += other
    return Found.of(decoded)


def _reports(lines: list[str]) -> Iterator[Mapping[str, object]]:
    for line in lines:
        if match := LINE.match(line):
            yield {
                "station": match["station"],
                "latitude": float(match["latitude"]),
                "longitude": float(match["longitude"]),
                "time": int(match["seconds"]),
                **decode(match["report"]),
            }


def decode(report: str) -> dict[str, float]:
    """Return the values of a report in K, m s-1, degrees and Pa; what it lacks is left out.

    A wind of variable direction (VRB) has a speed alone.
    """
    body, _, remarks = f"{report} ".partition(" RMK ")
    body, remarks = f"{body} ", f" {remarks} "
    decoded: dict[str, float] = {}
    if wind := WIND.search(body):
        decoded["wind_speed"] = int(wind[2]) * (KNOT if wind[3] == "KT" else 1.0)
        decoded["wind_direction"] = float(wind[1]) if wind[1] != "VRB" else np.nan
    if (tenths := TENTHS.search(remarks)) is not None:
        decoded["temperature"] = ZERO + _tenths(tenths[1], tenths[2])
        if tenths[3]:
            decoded["dewpoint"] = ZERO + _tenths(tenths[3], tenths[4])
    elif (degrees := BODY.search(body)) is not None:
        decoded["temperature"] = ZERO + float(degrees[1].replace("M", "-"))
        if degrees[2]:
            decoded["dewpoint"] = ZERO + float(degrees[2].replace("M", "-"))
    if altimeter := ALTIMETER.search(body):
        decoded["altimeter"] = int(altimeter[2]) * (
            INCH_OF_MERCURY / 100 if altimeter[1] == "A" else 100.0
        )
    if sea := SEA_LEVEL.search(remarks):
        tens = int(sea[1]) / 10
        decoded["sea_level_pressure"] = 100 * (tens + (900 if tens >= 50 else 1000))
    return decoded


def _tenths(sign: str, digits: str) -> float:
    return (-1 if sign == "1" else 1) * int(digits) / 10


COLUMNS = {
    "temperature": "temperature",
    "dewpoint": "dewpoint",
    "windSpeed": "wind_speed",
    "windDir": "wind_direction",
    "altimeter": "altimeter",
    "seaLevelPress": "sea_level_pressure",
}
"""Columns in K, m s-1, degrees and Pa; each may have a flag in a column that ends in DD."""

PLACES = ("stationName", "latitude", "longitude", "elevation", "timeObs")
DROPPED = "ZBXQk"
"""Flags of values that are not used: no check was made, bad, failed, questioned, rejected."""

NO_ELEVATION = 9999.0


def is_metar(columns: list[str]) -> bool:
    """Return whether a table has the layout of these reports."""
    return {"stationName", "timeObs"} <= set(columns)


def read_metar_parquet(path: Path) -> Found:
    """Read a file of reports; the time of a report is that of the observation.

    Raises:
        GatesError: A column that places reports is missing, or the file is damaged.
    """
    frame = read_parquet(path)
    if absent := [name for name in PLACES if name not in frame]:
        raise GatesError(f"METAR table lacks the column {', '.join(absent)}; add it")
    wide = pd.DataFrame(
        {
            "time": frame["timeObs"],
            "station": frame["stationName"],
            "latitude": frame["latitude"].astype(np.float64),
            "longitude": frame["longitude"].astype(np.float64),
            "elevation_m": frame["elevation"].where(frame["elevation"] < NO_ELEVATION),
        }
    )
    for column, name in COLUMNS.items():
        if column in frame:
            wide[name] = frame[column].astype(np.float64)
    decoded = Decoded("metar", wide)
    frame = frame.reset_index(drop=True)
    for column, name in COLUMNS.items():
        if column in frame and f"{column}DD" in frame:
            decoded.reject(
                frame[f"{column}DD"].astype(str).isin(list(DROPPED)), [name], "flagged by MADIS"
            )
    return Found.of(decoded)


def read_parquet(path: Path) -> pd.DataFrame:
    """Return a Parquet file as a table.

    Raises:
        GatesError: It is damaged.
    """
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GatesError(f"damaged or truncated Parquet ({reason}); copy it again") from error
