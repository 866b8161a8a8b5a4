"""From reports as instruments make them to the canonical table, with counts of rejects."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pandas as pd

from harness.files.texts import read_utf8
from weather.observations import conversions
from weather.observations.conversions import inconsistent_levels
from weather.observations.report_table import observation_error
from weather.variables import GRAVITY, VARIABLES

HIGHEST_REDUCED_M = 500.0  # of a station whose pressure is reduced to sea level
LOWEST_HUMIDITY_HPA = 300.0  # above, the humidity of common radiosondes is not reliable
SUPERSATURATION_K = 0.5  # of a dewpoint: temperature and dewpoint are rounded separately

PLACE = ("time", "latitude", "longitude", "station", "elevation_m", "level_hpa", "sounding")
QUANTITIES = (
    "temperature", "dewpoint", "relative_humidity", "humidity", "wind_speed", "wind_direction",
    "u", "v", "height", "station_pressure", "altimeter", "sea_level_pressure",
)  # fmt: skip
"""Columns of `Decoded.wide`: K, K, of 1, kg kg-1, m s-1, degrees, m s-1, geopotential m, Pa."""

PROFILE = (
    "temperature", "dewpoint", "relative_humidity", "humidity", "wind_speed", "wind_direction",
    "u", "v", "height",
)  # fmt: skip
"""Those of a level."""


@dataclass
class Decoded:
    """Reports of one file, one a row, in SI units.

    Attributes:
        kind: What reports, such as ``metar`` or ``radiosonde``.
        wide: Columns of `PLACE`, of `QUANTITIES`, and ``error_temperature``, ``error_u`` and so on
            where the file states errors; any may be absent, a missing value is NaN. A report
            without ``level_hpa`` is one of the surface; levels of one ascent have one number
            ``sounding``.
        rejected: Values that were rejected so far, by reason.
    """

    kind: str
    wide: pd.DataFrame
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.wide = self.wide.reset_index(drop=True)
        for name in (*PLACE, *QUANTITIES):
            if name not in self.wide:
                self.wide[name] = "" if name == "station" else np.nan

    def reject(self, where: np.ndarray | pd.Series, names: Sequence[str], reason: str) -> None:
        """Delete values and count them.

        Args:
            where: (N,) rows.
            names: Quantities.
            reason: Why.
        """
        rows = np.asarray(where, dtype=bool)
        if count := int(self.wide.loc[rows, list(names)].notna().to_numpy().sum()):
            self.rejected[reason] += count
            self.wide.loc[rows, list(names)] = np.nan

    def canonical(self) -> pd.DataFrame:
        """Convert and check the reports, and return a value per row, as in `COLUMNS` of the table.

        What is rejected on the way is counted in ``rejected``.
        """
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            self._convert_wind()
            self._convert_pressure()
            self._convert_humidity()
            self._check_soundings()
        return self._long()

    def _convert_wind(self) -> None:
        wide, pair = self.wide, ["wind_speed", "wind_direction"]
        speed, direction = wide["wind_speed"], wide["wind_direction"]
        self.reject((speed < 0) | (direction < 0) | (direction > 360), pair, "impossible wind")
        wide.loc[(wide["wind_speed"] == 0) & wide["wind_direction"].isna(), "wind_direction"] = 0.0
        self.reject(wide[pair].isna().any(axis=1), pair, "wind without direction or speed")
        u, v = conversions.wind_components(wide["wind_speed"], wide["wind_direction"])
        absent = wide[["u", "v"]].isna().any(axis=1) & np.isfinite(u)
        wide.loc[absent, "u"], wide.loc[absent, "v"] = u[absent], v[absent]

    def _convert_pressure(self) -> None:
        """Derive the pressure at a station from its altimeter setting, and at sea level from it."""
        wide = self.wide
        unknown = wide["elevation_m"].isna() & wide["station_pressure"].isna()
        needed = unknown & wide["sea_level_pressure"].isna()
        self.reject(needed, ["altimeter"], "altimeter setting without elevation")
        derived = conversions.station_pressure(wide["altimeter"], wide["elevation_m"])
        wide["station_pressure"] = wide["station_pressure"].fillna(pd.Series(derived))
        reduced = conversions.sea_level_pressure(
            wide["station_pressure"], wide["temperature"], wide["elevation_m"]
        )
        low = wide["elevation_m"].abs() < HIGHEST_REDUCED_M
        missing = wide["sea_level_pressure"].isna()
        wide["sea_level_pressure"] = wide["sea_level_pressure"].where(~(missing & low), reduced)

    def _convert_humidity(self) -> None:
        wide = self.wide
        self.reject(
            wide["dewpoint"] - wide["temperature"] > SUPERSATURATION_K,
            ["dewpoint"],
            "dewpoint above temperature",
        )
        relative = wide["relative_humidity"]
        self.reject((relative < 0) | (relative > 1.1), ["relative_humidity"], "impossible humidity")
        dewpoint = conversions.saturation_pressure(wide["dewpoint"])
        vapour = wide["relative_humidity"] * conversions.saturation_pressure(wide["temperature"])
        vapour = pd.Series(dewpoint).fillna(vapour)
        pressure = (100 * wide["level_hpa"]).fillna(wide["station_pressure"])
        stated = wide["dewpoint"].fillna(wide["relative_humidity"])
        wide["dewpoint"], wide["relative_humidity"] = stated, np.nan  # one value of humidity
        wide["humidity"] = wide["humidity"].fillna(
            pd.Series(conversions.specific_humidity(vapour, pressure))
        )
        self.reject(
            wide["humidity"].isna(), ["dewpoint"], "humidity without pressure or temperature"
        )
        self.reject(
            wide["level_hpa"] < LOWEST_HUMIDITY_HPA,
            ["humidity"],
            f"humidity above {LOWEST_HUMIDITY_HPA:g} hPa",
        )

    def _check_soundings(self) -> None:
        wide = self.wide
        measured = wide["level_hpa"].where(wide["temperature"].notna())
        ground = measured.groupby(wide["sounding"]).transform("max")
        self.reject(wide["level_hpa"] > ground, ["height"], "height below the ground")
        warm = wide["temperature"].where(
            wide["temperature"].between(VARIABLES["temperature"].low, VARIABLES["temperature"].high)
        )
        virtual = conversions.virtual_temperature(warm, wide["humidity"])
        bad = np.zeros((2, len(wide)), dtype=bool)
        for rows in wide.groupby("sounding").indices.values():
            level, height = (wide[name].to_numpy()[rows] for name in ("level_hpa", "height"))
            bad[:, rows] = inconsistent_levels(level, height, virtual[rows])
        for wrong, name in zip(bad, ("height", "temperature"), strict=True):
            self.reject(wrong, [name], "hydrostatic check")

    def _long(self) -> pd.DataFrame:
        surface = self.wide["level_hpa"].isna()
        parts = []
        for name, upper, ground, factor in (
            ("temperature", "temperature", "2m_temperature", 1.0),
            ("u", "u_component_of_wind", "10m_u_component_of_wind", 1.0),
            ("v", "v_component_of_wind", "10m_v_component_of_wind", 1.0),
            ("humidity", "specific_humidity", "specific_humidity", 1.0),
            ("height", "geopotential", "", GRAVITY),
            ("station_pressure", "", "surface_pressure", 1.0),
            ("sea_level_pressure", "", "mean_sea_level_pressure", 1.0),
        ):
            for variable, rows in ((upper, ~surface), (ground, surface)):
                present = rows & self.wide[name].notna()
                if variable and present.any():
                    parts.append(self._values(name, variable, self.wide[present], factor))
        if not parts:
            return self._values("temperature", "temperature", self.wide[:0], 1.0)
        return pd.concat(parts, ignore_index=True)

    def _values(self, name: str, variable: str, rows: pd.DataFrame, factor: float) -> pd.DataFrame:
        level = rows["level_hpa"].to_numpy()
        default = observation_error(variable, level, rows["temperature"].to_numpy())
        stated = f"error_{name}"
        error = rows[stated] * factor if stated in rows else pd.Series(np.nan, rows.index)
        ground = rows["height"].where(rows["level_hpa"].notna(), rows["elevation_m"])
        return pd.DataFrame(
            {
                "time": rows["time"],
                "latitude": rows["latitude"],
                "longitude": rows["longitude"],
                "level_hpa": level,
                "height_m": ground,
                "variable": variable,
                "value": rows[name] * factor,
                "error": error.where(error > 0, default),
                "station": rows["station"],
                "source": self.kind,
            }
        )


class Found(NamedTuple):
    """The content of one file.

    Attributes:
        frame: A value per row, with columns of `weather.observations.report_table.COLUMNS`.
        reports: Reports in the file: stations at a time, or levels of soundings.
        rejected: Values that were rejected, by reason.
        note: What else is to be said, empty if nothing.
    """

    frame: pd.DataFrame
    reports: int
    rejected: Counter[str]
    note: str = ""

    @classmethod
    def of(cls, decoded: Decoded, note: str = "") -> Self:
        """Convert reports, all of which count."""
        return cls(decoded.canonical(), len(decoded.wide), decoded.rejected, note)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        GatesError: It is not UTF-8.
    """
    return read_utf8(path).splitlines()
