"""The canonical table of observations: one report of one variable per row, of a period of time."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd

from core_gates.errors import GatesError, MissingExtraError
from harness.files import replacing
from harness.files.texts import check_cells
from weather.observations.conversions import saturation_pressure, specific_humidity
from weather.variables import GRAVITY, VARIABLES, standard_height

LEVELS = (1000.0, 850.0, 700.0, 500.0, 400.0, 300.0, 250.0, 200.0, 150.0, 100.0, 50.0, 30.0, 10.0)
UPPER_AIR: Mapping[str, tuple[float, ...]] = {
    "temperature": (1.7, 1.5, 1.3, 1.2, 1.2, 1.4, 1.5, 1.5, 1.6, 1.7, 1.9, 2.0, 2.5),
    "u_component_of_wind": (2.3, 2.3, 2.5, 3.0, 3.5, 3.7, 3.5, 3.5, 3.4, 3.3, 3.2, 3.2, 4.5),
    "geopotential": (42.0, 43.0, 51.0, 82.0, 96.0, 105.0, 116.0, 129.0, 149.0, 178.0, 221.0,
                     245.0, 390.0),
}  # fmt: skip
"""At `LEVELS`, in K, m s-1 and m2 s-2; linear in the logarithm of pressure in between."""

SURFACE: Mapping[str, float] = {
    "2m_temperature": 1.5,
    "10m_u_component_of_wind": 2.0,
    "10m_v_component_of_wind": 2.0,
    "mean_sea_level_pressure": 100.0,
    "surface_pressure": 100.0,
    "height": 10.0,
}
HUMIDITY = 0.15  # of saturation


def observation_error(
    variable: str, level_hpa: np.ndarray, temperature: np.ndarray | None = None
) -> np.ndarray:
    """Return the standard deviation of the error of reports, in the unit of the variable.

    Args:
        variable: WeatherBench-2 name.
        level_hpa: (N,) pressure, NaN at the surface, which counts as 1000 hPa.
        temperature: (N,) K, which decides the error of humidity; 273.15 K where unknown.

    Returns:
        (N,); NaN for a variable that has no error here.
    """
    level = np.where(np.isnan(level_hpa), LEVELS[0], level_hpa)
    if variable == "specific_humidity":
        warmth = np.full(level.shape, 273.15) if temperature is None else np.asarray(temperature)
        warmth = np.where(np.isnan(warmth), 273.15, warmth)
        vapour = np.minimum(saturation_pressure(warmth), 50 * level)  # thin, hot air cannot fill
        return HUMIDITY * specific_humidity(vapour, 100 * level)
    if variable in SURFACE:
        return np.full(level.shape, SURFACE[variable])
    table = UPPER_AIR.get(variable.replace("v_component", "u_component"))
    if table is None:
        return np.full(level.shape, np.nan)
    return np.interp(-np.log(level), -np.log(LEVELS), table)


Times = pd.Series | np.datetime64


class Period(NamedTuple):
    """Times from ``start`` up to, but not including, ``end``, UTC; None for no limit."""

    start: np.datetime64 | None = None
    end: np.datetime64 | None = None

    @classmethod
    def parse(cls, start: str | None, end: str | None) -> Self:
        """Read a period that the user states.

        Raises:
            GatesError: A time is unreadable, or the end is not after the start.
        """
        period = cls(_time(start, "start"), _time(end, "end"))
        if period.start is not None and period.end is not None and period.end <= period.start:
            raise GatesError(f"--end {end} is not after --start {start}: exchange them")
        return period

    def holds(self, times: Times) -> np.ndarray | np.bool_:
        """Return whether times lie in the period."""
        inside = np.ones(np.shape(times), dtype=bool)
        if self.start is not None:
            inside &= np.asarray(times >= self.start)
        if self.end is not None:
            inside &= np.asarray(times < self.end)
        return inside

    def widened(self, *, days: int) -> Self:
        """Return the period with days more at both ends."""
        more = np.timedelta64(days, "D")
        start = None if self.start is None else self.start - more
        return self._replace(start=start, end=None if self.end is None else self.end + more)

    def __str__(self) -> str:
        shown = ["any time" if edge is None else str(edge)[:16] for edge in self]
        return f"{shown[0]} to {shown[1]}"


def _time(text: str | None, option: str) -> np.datetime64 | None:
    if text is None:
        return None
    try:
        stamp = pd.to_datetime(text, utc=True, format="ISO8601")
    except ValueError as error:
        raise GatesError(f"--{option} {text!r} is no time, write it as 2017-01-01T00:00") from error
    if stamp is pd.NaT:
        raise GatesError(f"--{option} {text!r} is no time, write it as 2017-01-01T00:00")
    return np.datetime64(stamp.tz_localize(None).isoformat(), "ns")


SEARCHED = 2**16  # bytes at the beginning of a file, which tell its format and begin its content


def is_blank(content: bytes) -> bool:
    """Return whether there is nothing but space, of whatever width and encoding."""
    return not all(content.decode(code, "replace").strip() for code in ("latin-1", "utf-8-sig"))


COLUMNS: Mapping[str, Any] = {
    "time": "datetime64[ns]",
    "latitude": "float64",
    "longitude": "float64",
    "level_hpa": "float64",
    "height_m": "float64",
    "variable": "object",
    "value": "float64",
    "error": "float64",
    "station": "object",
    "source": "object",
    "qc": "int64",
}
"""Columns and types; a missing ``level_hpa`` (surface) or ``height_m`` is NaN, ``qc`` 0 is good."""

DEFAULTS: Mapping[str, object] = {
    "level_hpa": np.nan,
    "height_m": np.nan,
    "station": "",
    "source": "",
    "qc": 0,
}
OUT_OF_RANGE = 1  # value of qc


@dataclass(frozen=True, eq=False)
class ObservationTable:
    """Checked observations in SI units; build one with `from_frame`.

    Attributes:
        frame: The columns of `COLUMNS` in their order, longitude from 0 to 360, rows numbered
            from 0.
    """

    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, flag_out_of_range: bool = False) -> Self:
        """Check and complete a table.

        Args:
            frame: At least time, latitude, longitude, variable, value and error; other columns of
                `COLUMNS` have defaults, further columns are dropped. Times without a zone are UTC.
                A column ``units``, such as ``gpm``, ``degC`` or ``hPa``, has values and errors
                converted to SI units; an empty entry stands for those.
            flag_out_of_range: Give implausible values the quality flag 1, by which gridding
                leaves them out, instead of refusing the table. Values in a wrong unit are always
                refused.

        Raises:
            GatesError: One line with the fault, the first row that has it, and the fix.
        """
        absent = [name for name in COLUMNS if name not in frame and name not in DEFAULTS]
        if absent:
            raise GatesError(
                f"observations lack the column {', '.join(absent)}, found "
                f"{', '.join(map(str, frame.columns))}; rename or add it"
            )
        columns = {
            name: frame[name] if name in frame else pd.Series(DEFAULTS[name], frame.index)
            for name in COLUMNS
        }
        columns["time"] = _times(frame["time"])
        for name, kind in COLUMNS.items():
            if name != "time":
                columns[name] = _converted(columns[name], name, kind)
        table = pd.DataFrame(columns).reset_index(drop=True)
        if "unit" in frame:
            raise GatesError(
                "observations have a column unit; did you mean units? rename or drop it"
            )
        if "units" in frame:
            _convert_units(table, frame["units"].reset_index(drop=True))
        _check_positions(table)
        _check_errors(table)
        table["longitude"] %= 360.0
        outside = _out_of_range(table)
        if flag_out_of_range:
            table.loc[outside & (table["qc"] == 0), "qc"] = OUT_OF_RANGE
        else:
            _refuse_out_of_range(table, outside & (table["qc"] == 0))
        return cls(table)

    @classmethod
    def empty(cls) -> Self:
        """Return a table without observations."""
        return cls.from_frame(pd.DataFrame({name: [] for name in COLUMNS}))

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, flag_out_of_range: bool = False) -> Self:
        """Read a table from Parquet or CSV, by the suffix of the file, and check it.

        Args:
            path: The file.
            flag_out_of_range: See `from_frame`.

        Raises:
            GatesError: If the file is absent or unreadable, or for the reasons of `from_frame`.
        """
        source = Path(path)
        if not source.exists():
            raise GatesError(f"{source} does not exist; check the path")
        kind = table_format(source)
        try:
            if source.is_file():
                with source.open("rb") as file:
                    if is_blank(file.read(SEARCHED)):
                        raise ValueError("empty file")
            if kind == "csv":
                check_cells(source)
            frame = pd.read_csv(source) if kind == "csv" else pd.read_parquet(source)
        except ImportError as error:
            raise MissingExtraError("weather", "pyarrow") from error
        except (ValueError, OSError) as error:
            raise GatesError(
                f"{source} cannot be read as a table ({str(error).splitlines()[0]}), expected "
                "Parquet or CSV; convert it"
            ) from error
        try:
            return cls.from_frame(frame, flag_out_of_range=flag_out_of_range)
        except GatesError as error:
            raise GatesError(f"{source}: {error}") from error

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write as Parquet or CSV, by the suffix of the file; an old file is replaced whole.

        Raises:
            GatesError: If the suffix is another one.
        """
        target = Path(path)
        kind = table_format(target)
        with replacing(target) as partial:
            if kind == "csv":
                self.frame.to_csv(partial, index=False)
            else:
                self.frame.to_parquet(partial, index=False)
        return target


def table_format(path: Path) -> Literal["csv", "parquet"]:
    """Return the format that the suffix of a file stands for.

    Raises:
        GatesError: It stands for neither.
    """
    formats: dict[str, Literal["csv", "parquet"]] = {".csv": "csv", ".parquet": "parquet"}
    kind = formats.get(path.suffix.lower())
    if kind is None:
        raise GatesError(
            f"{path} ends in {path.suffix!r}, expected .parquet or .csv: rename or convert it"
        )
    return kind


def _times(times: pd.Series) -> pd.Series:
    times = times.astype(str) if pd.api.types.is_numeric_dtype(times) else times  # no epochs
    try:
        converted = pd.to_datetime(times, utc=True, format="ISO8601")
    except (ValueError, TypeError) as error:
        read = pd.to_datetime(times, utc=True, format="ISO8601", errors="coerce")
        bad = (read.isna() & times.notna()).to_numpy()
        row = int(bad.argmax())
        raise GatesError(
            f"{int(bad.sum())} of {len(bad)} observations have an unreadable time, the first is "
            f"{str(times.iloc[row])!r} in row {row}; write it as 2017-01-01T00:00"
        ) from error
    _refuse(converted.isna(), "time", converted, "a date", "drop rows without a time (NaT)")
    low, high = (stamp.tz_localize("UTC") for stamp in (pd.Timestamp.min, pd.Timestamp.max))
    _refuse(
        (converted <= low) | (converted >= high),
        "time",
        converted,
        "a date from 1678 to 2261",
        "correct or drop it",
    )
    return converted.dt.tz_localize(None).astype("datetime64[ns]")


def _converted(column: pd.Series, name: str, kind: Any) -> pd.Series:
    try:
        if kind == "object":
            column = column.astype(object).where(column.notna(), "").map(str)
        converted: pd.Series = column.astype(kind)
    except (ValueError, TypeError) as error:
        raise GatesError(
            f"{name} holds {column.dtype}, expected {kind} ({str(error).splitlines()[0]}); "
            "convert it"
        ) from error
    return converted


def _check_positions(table: pd.DataFrame) -> None:
    for name, low, high in (("latitude", -90, 90), ("longitude", -180, 360)):
        _refuse(
            ~table[name].between(low, high),
            name,
            table[name],
            f"degrees from {low} to {high}",
            "correct or drop it",
        )
    level = table["level_hpa"]
    _refuse(level <= 0, "level_hpa", level, "a positive pressure", "correct or drop it")
    _refuse(level > 1200, "level_hpa", level, "hPa", "it looks like Pa: divide by 100")


def _convert_units(table: pd.DataFrame, units: pd.Series) -> None:
    """Bring values and errors to SI units, in place.

    Raises:
        GatesError: A unit is not known for its variable.
    """
    stated = units.astype(object).where(units.notna(), "").map(str)
    for name, unit in set(zip(table["variable"], stated, strict=True)):
        variable = VARIABLES.get(name)
        if not unit.strip() or variable is None:
            continue
        factors = variable.conversion(unit)
        if factors is None:
            accepted = ", ".join([variable.unit, *(alias[0] for alias in variable.aliases)])
            raise GatesError(f"{name} is in units {unit!r}, expected one of {accepted}; convert it")
        rows = (table["variable"] == name) & (stated == unit)
        table.loc[rows, "value"] = table.loc[rows, "value"] * factors[0] + factors[1]
        table.loc[rows, "error"] *= factors[0]


def _check_errors(table: pd.DataFrame) -> None:
    good = np.isfinite(table["error"]) & (table["error"] > 0)
    _refuse(~good, "error", table["error"], "a positive standard deviation", "set it")
    _refuse(~np.isfinite(table["value"]), "value", table["value"], "a number", "drop the row")


def _out_of_range(table: pd.DataFrame) -> pd.Series:
    """Check names and units of the variables, and return which values are implausible."""
    outside = pd.Series(False, index=table.index)
    good = table[table["qc"] == 0]
    for name, values in good.groupby("variable")["value"]:
        variable = VARIABLES.get(str(name))
        if variable is None:
            close = get_close_matches(str(name), VARIABLES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(VARIABLES)}"
            raise GatesError(f"variable {name} is unknown; {hint}")
        low, high = values.quantile([0.05, 0.95])
        other = variable.wrong_unit(float(low), float(high))
        if other is not None:
            raise GatesError(
                f"{name} is mostly {low:.6g} to {high:.6g}, expected {variable.low:g} to "
                f"{variable.high:g} {variable.unit}; it looks like {other.name}: {other.fix}"
            )
        outside[values.index] = ~values.between(variable.low, variable.high)
    _check_geopotential(good)
    return outside


def _check_geopotential(table: pd.DataFrame) -> None:
    """Tell geopotential from geopotential height by the standard atmosphere at 100-850 hPa."""
    rows = table[(table["variable"] == "geopotential") & table["level_hpa"].between(100, 850)]
    if rows.empty:
        return
    share = (rows["value"] / standard_height(rows["level_hpa"].to_numpy())).median()
    for unit, size in (("gpm", 1.0), ("gpdam", 0.1)):
        if 0.7 * size < share < 1.3 * size:
            raise GatesError(
                f"geopotential is mostly {share:.3g} times the standard height of its level, "
                f"expected {GRAVITY} times; it looks like {unit}: add a column units with {unit}, "
                f"or multiply values and errors by {GRAVITY / size:.6g}"
            )


def _refuse_out_of_range(table: pd.DataFrame, outside: pd.Series) -> None:
    if outside.any():
        name = table["variable"].iloc[int(outside.to_numpy().argmax())]
        variable = VARIABLES[name]
        expected = f"{variable.low:g} to {variable.high:g} {variable.unit} for {name}"
        _refuse(
            outside,
            "value",
            table["value"],
            expected,
            "correct or drop it, or set flag_out_of_range",
        )


def _refuse(bad: pd.Series, name: str, values: pd.Series, expected: str, fix: str) -> None:
    """Raise if any row is bad, naming the first."""
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise GatesError(
            f"{int(bad.sum())} of {len(bad)} observations have a bad {name}, the first is "
            f"{values.iloc[row]} in row {row}, expected {expected}; {fix}"
        )
