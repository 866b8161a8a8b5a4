"""WMO BUFR: soundings, stations, ships and aircraft in the templates of the WMO.

Messages are decoded one by one by ecCodes through pdbufr (extra ``bufr``), so that a damaged one
costs itself alone. NCEP prepBUFR describes its contents by embedded tables and is refused.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from core_gates.errors import GatesError, MissingExtraError
from weather.observations.conversions import flight_level_pressure
from weather.observations.decoded import Decoded, Found

START, END = b"BUFR", b"7777"
KINDS: Mapping[int, str] = {0: "synop", 1: "ship", 2: "radiosonde", 4: "aircraft"}
"""Data categories (BUFR table A) that are read: single levels and vertical soundings."""

SOUNDING, TABLES, NCEP = 2, 11, 7
NAMES: Mapping[str, str] = {
    "airTemperature": "temperature",
    "dewpointTemperature": "dewpoint",
    "windSpeed": "wind_speed",
    "windDirection": "wind_direction",
    "nonCoordinateGeopotentialHeight": "height",
    "geopotentialHeight": "height",
    "nonCoordinatePressure": "station_pressure",
    "pressureReducedToMeanSeaLevel": "sea_level_pressure",
    "latitude": "latitude",
    "longitude": "longitude",
    "heightOfStationGroundAboveMeanSeaLevel": "elevation_m",
}
CLOCK = ("year", "month", "day", "hour", "minute", "second")
STATIONS = (
    "blockNumber", "stationNumber", "shipOrMobileLandStationIdentifier", "aircraftFlightNumber",
    "aircraftRegistrationNumberOrOtherIdentification",
)  # fmt: skip
LEVEL = ("pressure", "timePeriod", "latitudeDisplacement", "longitudeDisplacement", "flightLevel",
         "height")  # fmt: skip
MEASURED = ("temperature", "dewpoint", "wind_speed", "height")
KEYS = (*NAMES, *CLOCK, *STATIONS, *LEVEL)
ADVICE = (
    "it is NCEP prepBUFR, or has embedded tables of NCEP, which ecCodes cannot decode; convert it "
    "to IODA NetCDF (ioda-converters) or to a table, such as those of the NNJA archive"
)


class Message(NamedTuple):
    """One message: its bytes, edition, originating center, data category, local tables."""

    content: bytes
    center: int
    category: int
    local_tables: int


def read_bufr(path: Path) -> Found:
    """Read the messages of a file.

    Raises:
        GatesError: It is prepBUFR, or no message could be decoded.
        MissingExtraError: ecCodes or pdbufr are not installed.
    """
    content = path.read_bytes()
    messages = list(split_messages(content))
    if not messages:
        raise GatesError("truncated BUFR: no message is whole; copy it again")
    if any(message.category == TABLES and message.center == NCEP for message in messages):
        raise GatesError(ADVICE)
    lost: Counter[str] = Counter()
    if whole := content.count(START) - len(messages):
        lost["truncated messages"] += whole
    decoder = _decoder()
    frames: list[pd.DataFrame] = []
    kinds: list[str] = []
    for message in messages:
        kind = KINDS.get(message.category)
        if kind is None:
            lost[f"messages of category {message.category}"] += 1
            continue
        try:
            with _library_silent():
                rows = _decode(message, decoder)
        except GatesError:
            lost["messages that cannot be decoded"] += 1
            continue
        frames.append(rows.assign(sounding=rows["sounding"] + 1e6 * len(frames)))
        kinds.append(kind)
    if not frames:
        raise GatesError(f"no message could be read: {_listed(lost)}; {_hint(messages)}")
    return _found(frames, kinds, lost)


def split_messages(content: bytes) -> Iterator[Message]:
    """Yield the whole messages of a file, whatever lies between them (sections 0 and 1).

    Args:
        content: Of the file; bulletin headings and record markers are passed over.
    """
    place = content.find(START)
    while place >= 0:
        length, edition = int.from_bytes(content[place + 4 : place + 7]), content[place + 7 :][:1]
        end = place + length
        if length > 30 and content[end - 4 : end] == END:
            first = content[place + 8 :]
            if edition == b"\x04":
                center, category, local = int.from_bytes(first[4:6]), first[10], first[14]
            else:
                center, category, local = first[5], first[8], first[11]
            yield Message(content[place:end], center, category, local)
            place = content.find(START, end)
        else:
            place = content.find(START, place + 4)


def _decoder() -> Callable[..., pd.DataFrame]:
    """Return the function that decodes a file.

    Raises:
        MissingExtraError: ecCodes or pdbufr are not installed.
    """
    try:
        from pdbufr import read_bufr as decode
    except ModuleNotFoundError as error:
        raise MissingExtraError("bufr", error.name or "pdbufr") from error
    except RuntimeError as error:  # ecCodes without its library
        raise MissingExtraError("bufr", "eccodes") from error
    return cast(Callable[..., pd.DataFrame], decode)


@contextmanager
def _library_silent() -> Iterator[None]:
    """Discard what ecCodes writes to the standard error of the process about damaged messages."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _decode(message: Message, decode: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """Return the reports of a message as in `Decoded.wide`.

    Raises:
        GatesError: It cannot be decoded.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "message.bufr"
        path.write_bytes(message.content)
        try:
            if message.category == SOUNDING:
                rows = decode(path, columns=KEYS, required_columns=("pressure",))
            else:
                rows = decode(path, columns="data", flat=True)
        except Exception as error:  # of ecCodes: of many types
            raise GatesError(f"a message cannot be decoded ({error})") from error
    if rows.empty:
        raise GatesError("a message holds no report")
    if message.category != SOUNDING:
        rows = rows.rename(columns=lambda name: str(name).removeprefix("#1#"))
    return _wide(rows.reindex(columns=list(KEYS)), message.category)


def _wide(rows: pd.DataFrame, category: int) -> pd.DataFrame:
    texts = {name: rows[name] for name in STATIONS}
    numbers = rows.drop(columns=list(STATIONS)).apply(pd.to_numeric, errors="coerce")
    wide = pd.DataFrame(index=rows.index)
    for key, name in NAMES.items():
        column = numbers[key].astype(np.float64)
        wide[name] = wide[name].fillna(column) if name in wide else column
    clock = numbers[list(CLOCK)].fillna({"minute": 0, "second": 0})
    wide["time"] = pd.to_datetime(clock, errors="coerce").astype("datetime64[ns]")
    wide["station"] = [_station(row) for row in zip(*texts.values(), strict=True)]
    if category == SOUNDING:
        ascent = wide["time"].astype("int64").astype(str) + wide["station"]
        wide["sounding"] = pd.factorize(ascent)[0].astype(np.float64)
        wide["time"] += pd.to_timedelta(
            numbers["timePeriod"].fillna(0).where(lambda s: s >= 0, 0), unit="s"
        )
        wide["latitude"] += numbers["latitudeDisplacement"].fillna(0)
        wide["longitude"] += numbers["longitudeDisplacement"].fillna(0)
        wide["level_hpa"] = numbers["pressure"] / 100
        measured = wide[list(MEASURED)].notna().any(axis=1)  # the rest describes layers of shear
        return wide[measured].drop(columns=["station_pressure", "sea_level_pressure"])
    wide["sounding"] = np.nan
    if KINDS[category] == "aircraft":
        pressure = pd.Series(
            flight_level_pressure(numbers["flightLevel"].fillna(numbers["height"])), rows.index
        )
        wide["level_hpa"] = numbers["pressure"].fillna(pressure) / 100
        return wide.drop(columns=["height", "station_pressure", "sea_level_pressure"])
    return wide.drop(columns="height")


def _station(names: tuple[Any, ...]) -> str:
    """Return the name of a station: its WMO number of five digits, else whatever it is called."""
    block, number, *others = names
    if pd.notna(block) and pd.notna(number):
        return f"{int(block):02d}{int(number):03d}"
    named = [str(name).strip() for name in others if pd.notna(name) and str(name).strip()]
    return named[0] if named else ""


def _found(frames: list[pd.DataFrame], kinds: list[str], lost: Counter[str]) -> Found:
    """Convert the reports of each kind, and join them."""
    parts, reports, rejected = [], 0, Counter[str]()
    for kind in dict.fromkeys(kinds):
        of_kind = [frame for frame, other in zip(frames, kinds, strict=True) if other == kind]
        decoded = Found.of(Decoded(kind, pd.concat(of_kind, ignore_index=True)))
        parts.append(decoded.frame)
        reports += decoded.reports
        rejected += decoded.rejected
    return Found(pd.concat(parts, ignore_index=True), reports, rejected, _listed(lost))


def _listed(lost: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in lost.items())


def _hint(messages: list[Message]) -> str:
    """Return what to do with a file that cannot be decoded."""
    if any(message.center == NCEP and message.local_tables for message in messages):
        return ADVICE
    return "give WMO templates of surface, sounding or aircraft reports"
