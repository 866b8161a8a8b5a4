"""METAR and SPECI reports as WeatherBench has them: Parquet with the quality flags of MADIS."""

from pathlib import Path

import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from weather.observations.decoded import Decoded
from weather.observations.readers.result import Found

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
            flagged = frame[f"{column}DD"].astype(str).isin(list(DROPPED))
            decoded.reject(flagged, [name], "flagged by MADIS")
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
