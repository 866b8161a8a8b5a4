"""Soundings as text: IGRA-2 in fixed columns, and 21 columns of numbers a level."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from weather.observations.decoded import PROFILE, Decoded, Found, read_lines
from weather.observations.report_table import Period
from weather.variables import standard_height

FIELDS = {
    "elapsed": (3, 8), "pressure": (9, 15), "height": (16, 21), "temperature": (22, 27),
    "relative_humidity": (28, 33), "depression": (34, 39), "wind_direction": (40, 45),
    "wind_speed": (46, 51),
}  # fmt: skip
"""First and last column, counted from 0, of integers: MMMSS, Pa, m, and tenths of deg C, %, deg C;
degrees; tenths of m s-1."""

REMOVED, IGRA_MISSING = -8888, -9999  # by their quality control; never reported
SHORTEST_HEADER, SHORTEST_LEVEL = 71, 51
MOST_BYTES = 2**31


class Header(NamedTuple):
    """The first line of a sounding: station, time of release, levels, place."""

    station: str
    time: np.datetime64
    levels: int
    latitude: float
    longitude: float


def is_igra_line(line: str) -> bool:
    """Return whether a line is the header of a sounding."""
    return _header(line) is not None


def read_igra(path: Path, period: Period) -> Found:
    """Read the soundings of a period; the time of a level is release plus elapsed time.

    The nominal hour stands in for a release that is not known. Soundings that were released a day
    or more outside of the period are not decoded, since a file holds all years of a station.

    Raises:
        GatesError: There is no sounding, or the archive is damaged.
    """
    wide, levels, skipped, cut = _soundings(_lines(path), period.widened(days=1))
    if not (len(wide) or skipped):
        raise GatesError("no line is the header of an IGRA-2 sounding; give files *-data.txt")
    notes = [f"{skipped} soundings of another time are not read"] if skipped else []
    notes += [f"{cut} soundings are truncated"] if cut else []
    decoded = Decoded("radiosonde", wide)
    _fill(decoded, levels)
    return Found.of(decoded, "; ".join(notes))


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, or of the only file in an archive.

    Raises:
        GatesError: A byte is not ASCII, or the archive is damaged.
    """
    try:
        content = _archived(path) if zipfile.is_zipfile(path) else path.read_bytes()
    except (zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        raise GatesError("damaged archive, or not of one file; copy it again") from error
    if other := re.search(rb"[^\x01-\x7f]", content):
        *before, line = content[: other.start()].split(b"\n")
        raise GatesError(
            f"{path}, line {len(before) + 1}: byte {len(line) + 1} is not ASCII, expected of"
            " IGRA-2; copy the file again"
        )
    return content.decode("ascii").splitlines()


def _archived(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (member,) = archive.infolist()
        if member.file_size > MOST_BYTES:
            raise GatesError(f"{member.filename} has {member.file_size} bytes; unpack it")
        return archive.read(member)


def _header(line: str) -> Header | None:
    """Return what a header says, None if the line is none."""
    if len(line) < SHORTEST_HEADER or line[0] != "#":
        return None
    try:
        day = np.datetime64(f"{line[13:17]}-{line[18:20]}-{line[21:23]}", "m")
        hour, release = int(line[24:26]), int(line[27:31])
        return Header(
            line[1:12].strip(),
            day + _minutes(hour, release),
            int(line[32:36]),
            int(line[55:62]) / 1e4,
            int(line[63:71]) / 1e4,
        )
    except ValueError:
        return None


def _minutes(hour: int, release: int) -> np.timedelta64:
    """Return release or nominal time after the start of the nominal day.

    Raises:
        ValueError: Neither is known.
    """
    hours, minutes = divmod(release, 100)
    if hours > 23:
        if hour > 23:
            raise ValueError("neither hour nor time of release")
        return np.timedelta64(60 * hour, "m")
    minutes = 0 if minutes > 59 else minutes
    day = 0
    if hour <= 23 and abs(hours - hour) > 12:  # released before the midnight of its nominal hour
        day = -1 if hours > hour else 1
    return np.timedelta64(60 * (24 * day + hours) + minutes, "m")


def _soundings(lines: Sequence[str], period: Period) -> tuple[pd.DataFrame, list[str], int, int]:
    """Return place and time of every level, its line, and numbers of soundings left out, cut."""
    headers: list[Header] = []
    counts: list[int] = []
    levels: list[str] = []
    skipped = cut = position = 0
    while position < len(lines):
        header = _header(lines[position])
        position += 1
        if header is None:
            continue
        end = position
        while end < min(position + header.levels, len(lines)) and lines[end][:1] != "#":
            end += 1
        full = [line for line in lines[position:end] if len(line) >= SHORTEST_LEVEL]
        position = end
        if not period.holds(header.time):
            skipped += 1
            continue
        cut += len(full) < header.levels
        headers.append(header)
        counts.append(len(full))
        levels.extend(full)
    rows = np.repeat(np.arange(len(headers)), counts)
    columns = {name: [getattr(h, name) for h in headers] for name in Header._fields}
    wide = pd.DataFrame(columns).iloc[rows].drop(columns="levels").assign(sounding=1.0 * rows)
    wide["time"] = wide["time"].astype("datetime64[ns]")
    return wide.reset_index(drop=True), levels, skipped, cut


def _fill(decoded: Decoded, levels: Sequence[str]) -> None:
    """Add the values of all levels."""
    text = pd.Series(levels, dtype=str)
    fields = {
        name: pd.to_numeric(text.str.slice(*columns), errors="coerce").to_numpy(np.float64)
        for name, columns in FIELDS.items()
    }
    removed = sum(int((value == REMOVED).sum()) for value in fields.values())
    if removed:
        decoded.rejected["removed by the quality control of IGRA"] += removed
    cleaned = {name: np.where(value <= REMOVED, np.nan, value) for name, value in fields.items()}
    minutes, seconds = np.divmod(np.nan_to_num(cleaned["elapsed"]), 100)
    wide = decoded.wide
    wide["time"] += pd.to_timedelta(60 * minutes + seconds, unit="s")
    wide["level_hpa"] = cleaned["pressure"] / 100
    wide["height"] = cleaned["height"]
    wide["temperature"] = cleaned["temperature"] / 10 + 273.15
    wide["dewpoint"] = wide["temperature"] - cleaned["depression"] / 10
    wide["relative_humidity"] = cleaned["relative_humidity"] / 1000
    wide["wind_direction"] = cleaned["wind_direction"]
    wide["wind_speed"] = cleaned["wind_speed"] / 10
    decoded.reject(wide["level_hpa"].isna(), PROFILE, "level without pressure")


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
SONDE_MISSING = (999.0, 9999.0, 99999.0)
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
    missing = np.isin(data, SONDE_MISSING)
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
