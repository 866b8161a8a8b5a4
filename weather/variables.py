"""Physical variables: their unit, plausible range, and the units that they are confused with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core_gates.errors import GatesError

GRAVITY = 9.80665  # m s-2, of geopotential meters


@dataclass(frozen=True)
class OtherUnit:
    """A unit in which a variable is often delivered by mistake.

    Attributes:
        name: What the values look like.
        scale: Factor to the right unit, applied before the offset.
        offset: Term to the right unit.
        fix: What to do with the values.
    """

    name: str
    scale: float
    offset: float
    fix: str


@dataclass(frozen=True)
class Variable:
    """Unit and plausible range of a variable.

    Attributes:
        unit: Unit of all values in this package.
        low: Smallest plausible value.
        high: Largest plausible value.
        confused_with: Wrong units that the range reveals.
        standard_name: Name in the conventions for climate and forecast data.
        aliases: Units that a report may state, with their factor and term to the
            right one.
    """

    unit: str
    low: float
    high: float
    confused_with: tuple[OtherUnit, ...] = ()
    standard_name: str = ""
    aliases: tuple[tuple[str, float, float], ...] = ()

    def conversion(self, unit: str) -> tuple[float, float] | None:
        """Return factor and term from a unit to the right one, None if it is unknown."""
        plain = _plain(unit)
        if plain == _plain(self.unit):
            return 1.0, 0.0
        return next((rest for name, *rest in self.aliases if _plain(name) == plain), None)  # type: ignore[return-value]

    def wrong_unit(self, low: float, high: float) -> OtherUnit | None:
        """Return the unit that values from ``low`` to ``high`` are probably in, if it is known."""
        if self.low <= low and high <= self.high:
            return None
        for other in self.confused_with:
            converted = low * other.scale + other.offset, high * other.scale + other.offset
            if self.low <= converted[0] and converted[1] <= self.high:
                return other
        return None


CELSIUS = OtherUnit("degrees Celsius", 1.0, 273.15, "add 273.15")
HECTOPASCAL = OtherUnit("hPa", 100.0, 0.0, "multiply by 100")
GRAM_PER_KG = OtherUnit("g/kg", 1e-3, 0.0, "divide by 1000")


def _plain(unit: str) -> str:
    """Return a unit in one spelling: ``m² s⁻²``, ``m2/s2`` and ``m**2 s**-2`` are ``m2s-2``."""
    plain = unit.strip().translate(str.maketrans("²⁻¹", "2-1")).replace("**", "").replace("^", "")
    over = plain.split("/")
    if len(over) == 2:
        bottom = over[1].strip()
        plain = (
            f"{over[0]}{bottom}-1" if bottom.isalpha() else f"{over[0]}{bottom[:-1]}-{bottom[-1]}"
        )
    return plain.replace(" ", "")


_CELSIUS = tuple((name, 1.0, 273.15) for name in ("degC", "C", "°C", "celsius", "Celsius"))
_PASCAL = (("hPa", 100.0, 0.0), ("mbar", 100.0, 0.0), ("kPa", 1000.0, 0.0))
_SPEED = (("kt", 0.514444, 0.0), ("knots", 0.514444, 0.0), ("km h-1", 1 / 3.6, 0.0))
_HEIGHT = tuple((name, GRAVITY, 0.0) for name in ("gpm", "m", "geopotential meters"))
_DECAMETER = tuple((name, 10 * GRAVITY, 0.0) for name in ("gpdam", "gpdm", "dam"))


def _temperature(name: str) -> Variable:
    return Variable("K", 150.0, 350.0, (CELSIUS,), name, _CELSIUS)


def _wind(name: str) -> Variable:
    return Variable("m s-1", -150.0, 150.0, (), name, _SPEED)


def _pressure(low: float, high: float, name: str) -> Variable:
    return Variable("Pa", low, high, (HECTOPASCAL,), name, _PASCAL)


VARIABLES = {
    "10m_u_component_of_wind": _wind("eastward_wind"),
    "10m_v_component_of_wind": _wind("northward_wind"),
    "2m_temperature": _temperature("air_temperature"),
    "mean_sea_level_pressure": _pressure(85_000.0, 110_000.0, "air_pressure_at_mean_sea_level"),
    "surface_pressure": _pressure(40_000.0, 115_000.0, "surface_air_pressure"),
    "geopotential": Variable(
        "m2 s-2", -10_000.0, 600_000.0, (), "geopotential", (*_HEIGHT, *_DECAMETER)
    ),
    "specific_humidity": Variable(
        "kg kg-1", -1e-3, 0.05, (GRAM_PER_KG,), "specific_humidity", (("g kg-1", 1e-3, 0.0),)
    ),
    "u_component_of_wind": _wind("eastward_wind"),
    "v_component_of_wind": _wind("northward_wind"),
    "temperature": _temperature("air_temperature"),
    "height": Variable("m", 0.0, 50_000.0, (), "", (("dam", 10.0, 0.0), ("km", 1000.0, 0.0))),
}
"""By WeatherBench-2 name."""


def unit_of(name: str) -> str:
    """Return the unit of a variable, or an empty string if the variable is unknown."""
    return VARIABLES[name].unit if name in VARIABLES else ""


def attributes_of(name: str) -> dict[str, str]:
    """Return unit and standard name of a variable by their attributes; nothing if it is unknown."""
    if name not in VARIABLES:
        return {}
    texts = {"units": VARIABLES[name].unit, "standard_name": VARIABLES[name].standard_name}
    return {key: value for key, value in texts.items() if value}


def standard_height(pressure_hpa: np.ndarray | float) -> np.ndarray:
    """Return the height in the standard atmosphere, m, of pressures in the troposphere, hPa."""
    return np.asarray(44_330.8 * (1 - (np.asarray(pressure_hpa) / 1013.25) ** 0.190263))


FILL_VALUE_SIZE = 1e15  # nothing physical is as large; fill values are 1e20 or 9.97e36


def check_range(name: str, low: float, high: float) -> None:
    """Refuse a field whose values are those of another unit, or of nothing physical.

    Args:
        name: WeatherBench-2 name; of other names only fill values are refused.
        low: Its smallest value.
        high: Its largest value.

    Raises:
        GatesError: The range is impossible.
    """
    span = f"{name} ranges from {low:.6g} to {high:.6g}"
    if max(abs(low), abs(high)) > FILL_VALUE_SIZE:
        raise GatesError(
            f"{span}, which is a fill value; set the attribute _FillValue so that it is masked"
        )
    variable = VARIABLES.get(name)
    if variable is None:
        return
    expected = f"{span}, expected {variable.low:g} to {variable.high:g} {variable.unit}"
    other = variable.wrong_unit(low, high)
    if other is not None:
        raise GatesError(f"{expected}; it looks like {other.name}: {other.fix}")
    if not _within_twice(variable, low, high):
        raise GatesError(f"{expected}; check its unit and its scale_factor")


def _within_twice(variable: Variable, low: float, high: float) -> bool:
    """Fields may exceed the plausible range of single values by half its width on each side."""
    margin = (variable.high - variable.low) / 2
    return variable.low - margin <= low and high <= variable.high + margin
