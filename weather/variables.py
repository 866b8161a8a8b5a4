"""Physical variables: their unit, plausible range, and the units that they are confused with."""

from dataclasses import dataclass


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
        confused_with: Wrong units that the range can tell.
    """

    unit: str
    low: float
    high: float
    confused_with: tuple[OtherUnit, ...] = ()

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

_TEMPERATURE = Variable("K", 150.0, 350.0, (CELSIUS,))
_WIND = Variable("m s-1", -150.0, 150.0)

VARIABLES = {
    "10m_u_component_of_wind": _WIND,
    "10m_v_component_of_wind": _WIND,
    "2m_temperature": _TEMPERATURE,
    "mean_sea_level_pressure": Variable("Pa", 85_000.0, 110_000.0, (HECTOPASCAL,)),
    "surface_pressure": Variable("Pa", 40_000.0, 115_000.0, (HECTOPASCAL,)),
    "geopotential": Variable("m2 s-2", -10_000.0, 600_000.0),
    "specific_humidity": Variable("kg kg-1", -1e-3, 0.05, (GRAM_PER_KG,)),
    "u_component_of_wind": _WIND,
    "v_component_of_wind": _WIND,
    "temperature": _TEMPERATURE,
    "height": Variable("m", 0.0, 50_000.0),
}
"""By WeatherBench-2 name."""


def unit_of(name: str) -> str:
    """Return the unit of a variable, or an empty string if the variable is unknown."""
    return VARIABLES[name].unit if name in VARIABLES else ""
