"""IODA NetCDF of JEDI, versions 2 and 3: groups MetaData, ObsValue, ObsError and of quality.

Both spellings of variables are known (``airTemperature``, ``air_temperature``). A report without
pressure in MetaData, one of a file that has the pressure of stations, and one of the prepBUFR types
180-199 and 280-299 (ObsType) is of the surface.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from core_gates.errors import GatesError
from weather.observations.conversions import VIRTUAL
from weather.observations.decoded import Decoded, Found
from weather.variables import VARIABLES

PRESSURES, SPEEDS, TEMPERATURES = "surface_pressure", "u_component_of_wind", "temperature"
NAMES: Mapping[str, tuple[str, str]] = {
    "airtemperature": ("temperature", TEMPERATURES),
    "temperature": ("temperature", TEMPERATURES),
    "virtualtemperature": ("virtual", TEMPERATURES),
    "dewpointtemperature": ("dewpoint", TEMPERATURES),
    "specifichumidity": ("humidity", "specific_humidity"),
    "relativehumidity": ("relative_humidity", ""),
    "windeastward": ("u", SPEEDS),
    "eastwardwind": ("u", SPEEDS),
    "windnorthward": ("v", SPEEDS),
    "northwardwind": ("v", SPEEDS),
    "windspeed": ("wind_speed", SPEEDS),
    "winddirection": ("wind_direction", ""),
    "height": ("height", "height"),
    "geopotentialheight": ("height", "height"),
    "stationpressure": ("station_pressure", PRESSURES),
    "surfacepressure": ("station_pressure", PRESSURES),
    "pressurereducedtomeansealevel": ("sea_level_pressure", PRESSURES),
    "meansealevelpressure": ("sea_level_pressure", PRESSURES),
}
"""Name without case and underscores -> quantity and the variable that has its units."""

QUALITY = (("EffectiveQC", 0), ("PreQC", 3), ("QualityMarker", 3))
"""Groups by preference, with the largest flag that is good: 0 of UFO, 3 of NCEP."""

SURFACE_TYPES = ((180, 199), (280, 299))
LARGEST = 1e9  # older files have no attribute for missing values, but enormous ones
EPOCH = re.compile(r"(second|minute|hour|day)s? since (\S+?)(?:[T ](\S+?))?Z?$")
ISO = 20  # letters of 2020-01-01T00:00:00Z


def is_ioda(file: h5py.File) -> bool:
    """Return whether a file has the groups of IODA."""
    return "MetaData" in file and "ObsValue" in file


def read_ioda(path: Path) -> Found:
    """Read a file.

    Raises:
        GatesError: It is damaged, has a unit that is not known, or lacks time or place.
    """
    try:
        with h5py.File(path) as file:
            decoded, unknown = _decode(file)
    except (OSError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise GatesError(f"damaged or truncated NetCDF ({reason}); copy it again") from error
    return Found.of(decoded, f"not converted: {', '.join(unknown)}" if unknown else "")


def _decode(file: h5py.File) -> tuple[Decoded, list[str]]:
    meta, values = _by_plain_name(file["MetaData"]), _by_plain_name(file["ObsValue"])
    for name in ("latitude", "longitude", "datetime"):
        if name not in meta:
            raise GatesError(f"IODA file lacks MetaData/{name}, found {', '.join(meta)}")
    wide = pd.DataFrame(
        {
            "time": _times(meta["datetime"]),
            "latitude": _numbers(meta["latitude"]),
            "longitude": _numbers(meta["longitude"]),
        }
    )
    if "stationidentification" in meta:
        wide["station"] = _texts(meta["stationidentification"])
    for name in ("stationelevation", "heightofstation"):
        if name in meta:
            wide["elevation_m"] = _numbers(meta[name])
    if "pressure" in meta:
        pressure = _converted(meta["pressure"], _numbers(meta["pressure"]), PRESSURES)
        wide["level_hpa"] = np.where(_of_surface(file, values), np.nan, pressure / 100)
        wide["sounding"] = _soundings(wide, meta)
    decoded = Decoded("ioda", wide)
    unknown = [name for plain, name in _original(file["ObsValue"]) if plain not in NAMES]
    for plain, (quantity, variable) in NAMES.items():
        if plain in values:
            _fill(decoded, file, plain, quantity, variable)
    if "virtual" in decoded.wide:
        _remove_vapour(decoded)
    return decoded, unknown


def _fill(decoded: Decoded, file: h5py.File, plain: str, quantity: str, variable: str) -> None:
    """Add one variable with its errors, and reject what a flag says is poor."""
    wide = decoded.wide
    data = _by_plain_name(file["ObsValue"])[plain]
    converted = _converted(data, _numbers(data), variable)
    wide[quantity] = (
        converted if quantity not in wide else wide[quantity].fillna(pd.Series(converted))
    )
    errors = _by_plain_name(file["ObsError"]) if "ObsError" in file else {}
    if plain in errors:
        offset_free = _converted(errors[plain], _numbers(errors[plain]), variable, offset=False)
        wide[f"error_{quantity}"] = offset_free
    for group, best in QUALITY:
        groups = [name for name in file if str(name).startswith(group)]
        flags = _by_plain_name(file[max(groups)]) if groups else {}
        if plain in flags:
            decoded.reject(_numbers(flags[plain]) > best, [quantity], f"flagged by {group}")
            return


def _remove_vapour(decoded: Decoded) -> None:
    """Turn virtual into actual temperatures where the humidity is known; the others are lost."""
    wide = decoded.wide
    wide["temperature"] = wide["temperature"].fillna(
        wide["virtual"] / (1 + VIRTUAL * wide["humidity"])
    )
    if "error_virtual" in wide:
        wide["error_temperature"] = wide.get(
            "error_temperature", pd.Series(np.nan, wide.index)
        ).fillna(wide["error_virtual"])
    decoded.reject(wide["humidity"].isna(), ["virtual"], "virtual temperature without humidity")


def _of_surface(file: h5py.File, values: Mapping[str, h5py.Dataset]) -> np.ndarray | bool:
    """Return which reports are of the surface although they have a pressure."""
    if any(NAMES.get(name, ("", ""))[0] == "station_pressure" for name in values):
        return True
    if "ObsType" not in file or not len(file["ObsType"]):
        return False
    kinds = [_numbers(kind) for kind in _by_plain_name(file["ObsType"]).values()]
    surface = np.zeros(kinds[0].shape, dtype=bool)
    for kind in kinds:
        for low, high in SURFACE_TYPES:
            surface |= (low <= kind) & (kind <= high)
    return surface


def _soundings(wide: pd.DataFrame, meta: Mapping[str, h5py.Dataset]) -> np.ndarray:
    """Return a number per sounding: that of the file, else one for each station and time."""
    for name in ("sequencenumber", "recordnumber"):
        if name in meta:
            return _numbers(meta[name])
    station = wide["station"] if "station" in wide else wide["latitude"].astype(str)
    return pd.factorize(station + wide["time"].astype(str))[0].astype(np.float64)


def _original(group: h5py.Group) -> list[tuple[str, str]]:
    datasets = [n for n in group if isinstance(group[n], h5py.Dataset)]
    return [(str(name).replace("_", "").lower(), str(name)) for name in datasets]


def _by_plain_name(group: h5py.Group) -> dict[str, h5py.Dataset]:
    """Return the datasets of a group by their names without case and underscores."""
    return {plain: group[name] for plain, name in _original(group)}


def _numbers(data: h5py.Dataset) -> np.ndarray:
    """Return (N,) numbers, NaN where missing.

    Raises:
        GatesError: They are no numbers, or have channels.
    """
    if data.dtype.kind not in "iuf" or data.ndim != 1:
        raise GatesError(
            f"{data.name} is {data.dtype} of {data.ndim} dimensions, expected numbers by location"
        )
    numbers = data[:].astype(np.float64)
    fill = np.atleast_1d(data.attrs.get("_FillValue", data.fillvalue))[0]
    missing = ~(np.abs(numbers) < LARGEST)
    if "_FillValue" in data.attrs:
        missing |= numbers == np.float64(fill)
    numbers[missing] = np.nan
    return numbers


def _texts(data: h5py.Dataset) -> list[str]:
    """Return strings; rows of letters are joined."""
    values = data[:]
    if values.ndim == 2:
        return [b"".join(np.asarray(row, dtype="S1")).decode(errors="replace") for row in values]
    texts = [n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in values]
    return [text.strip(" \0") for text in texts]


def _times(data: h5py.Dataset) -> pd.Series:
    """Return times of an integer with an epoch, or of text; NaT where missing.

    Raises:
        GatesError: There is no epoch.
    """
    if data.dtype.kind not in "iuf":
        texts = pd.Series(_texts(data)).str.slice(0, ISO)
        return pd.to_datetime(texts, utc=True, errors="coerce").dt.tz_localize(None)
    units = _units(data)
    match = EPOCH.match(units)
    if match is None:
        raise GatesError(f"{data.name} is in {units!r}, expected seconds since a date; state it")
    try:
        epoch = np.datetime64(f"{match[2]}T{match[3] or '00:00:00'}", "ns")
    except ValueError as error:
        raise GatesError(f"{data.name} is in {units!r}, whose date is unreadable") from error
    size = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}[match[1]]
    counts = data[:]
    fill = np.atleast_1d(data.attrs.get("_FillValue", data.fillvalue))[0]
    missing = (counts == fill) if "_FillValue" in data.attrs else np.zeros(len(counts), dtype=bool)
    missing |= np.abs(counts.astype(np.float64)) * size > LARGEST * 9
    nanoseconds = np.round(np.where(missing, 0, counts) * (size * 10**9)).astype("timedelta64[ns]")
    return pd.Series(np.where(missing, np.datetime64("NaT", "ns"), epoch + nanoseconds))


def _units(data: h5py.Dataset) -> str:
    """Return the attribute units, empty if there is none."""
    unit = np.atleast_1d(data.attrs.get("units", ""))[0]
    return unit.decode(errors="replace") if isinstance(unit, bytes) else str(unit)


def _converted(
    data: h5py.Dataset, values: np.ndarray, variable: str, *, offset: bool = True
) -> np.ndarray:
    """Bring values to SI units.

    Raises:
        GatesError: Their unit is not known.
    """
    unit = _units(data).strip()
    if not variable:  # humidity relative to saturation, directions
        return values / 100 if unit in ("%", "percent") else values
    plain = {"kg kg^-1": "kg kg-1", "m s^-1": "m s-1"}.get(unit, unit)
    if plain in ("", "1", "none"):
        return values
    factors = VARIABLES[variable].conversion(plain)
    if factors is None:
        raise GatesError(
            f"{data.name} is in {unit!r}, expected {VARIABLES[variable].unit}; convert it or "
            "correct its attribute units"
        )
    return values * factors[0] + (factors[1] if offset else 0.0)
