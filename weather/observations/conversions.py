"""From what instruments report to what models carry: wind, humidity, pressure, thickness."""

import numpy as np
import pandas as pd

from weather.variables import GRAVITY

DRY_AIR = 287.05  # J kg-1 K-1
VAPOUR_RATIO = 0.622  # gas constant of dry air over that of water vapour
VIRTUAL = 1 / VAPOUR_RATIO - 1
SEA_LEVEL_TEMPERATURE, SEA_LEVEL_PRESSURE, LAPSE_RATE = 288.15, 101_325.0, 0.0065  # ICAO, SI units
EXPONENT = DRY_AIR * LAPSE_RATE / GRAVITY
TROPOPAUSE_HEIGHT, TROPOPAUSE_TEMPERATURE = 11_000.0, 216.65

Values = np.ndarray | pd.Series


def wind_components(speed: Values, direction: Values) -> tuple[np.ndarray, np.ndarray]:
    """Return the eastward and northward wind, m s-1.

    Args:
        speed: m s-1.
        direction: Where the wind comes from, in degrees clockwise from north.
    """
    speed, angle = np.asarray(speed, dtype=np.float64), np.deg2rad(np.asarray(direction))
    return -speed * np.sin(angle), -speed * np.cos(angle)


def saturation_pressure(temperature: Values) -> np.ndarray:
    """Return the saturation vapour pressure over liquid water, Pa (Sonntag 1990).

    Dewpoints and humidities of the WMO are over water at all temperatures.

    Args:
        temperature: K.
    """
    t = np.asarray(temperature, dtype=np.float64)
    powers = -6096.9385 / t + 21.2409642 - 2.711193e-2 * t + 1.673952e-5 * t**2
    return np.asarray(np.exp(powers + 2.433502 * np.log(t)))


def specific_humidity(vapour_pressure: Values, pressure: Values) -> np.ndarray:
    """Return the specific humidity, kg kg-1, of a vapour pressure and a pressure in Pa."""
    e, p = np.asarray(vapour_pressure, dtype=np.float64), np.asarray(pressure, dtype=np.float64)
    return np.asarray(VAPOUR_RATIO * e / (p - (1 - VAPOUR_RATIO) * e))


def virtual_temperature(temperature: Values, humidity: Values) -> np.ndarray:
    """Return the virtual temperature, K, with unknown specific humidity (NaN) taken as dry."""
    return np.asarray(temperature) * (1 + VIRTUAL * np.nan_to_num(np.asarray(humidity)))


def station_pressure(altimeter: Values, elevation: Values) -> np.ndarray:
    """Return the pressure at a station, Pa, of an altimeter setting.

    An altimeter that is set to it shows the elevation of the station: the pressure altitudes of
    both pressures in the standard atmosphere differ by the elevation.

    Args:
        altimeter: QNH, Pa.
        elevation: m.
    """
    sea = (np.asarray(altimeter, dtype=np.float64) / SEA_LEVEL_PRESSURE) ** EXPONENT
    station = sea - LAPSE_RATE / SEA_LEVEL_TEMPERATURE * np.asarray(elevation, dtype=np.float64)
    return np.asarray(SEA_LEVEL_PRESSURE * station ** (1 / EXPONENT))


def sea_level_pressure(pressure: Values, temperature: Values, elevation: Values) -> np.ndarray:
    """Reduce the pressure at a station to sea level, Pa, through a column of 6.5 K per km.

    Args:
        pressure: At the station, Pa.
        temperature: At the station, K.
        elevation: m; the higher, the less a sea-level pressure means.
    """
    height = np.asarray(elevation, dtype=np.float64)
    mean = np.asarray(temperature, dtype=np.float64) + LAPSE_RATE * height / 2
    return np.asarray(np.asarray(pressure) * np.exp(GRAVITY * height / (DRY_AIR * mean)))


def flight_level_pressure(altitude: Values) -> np.ndarray:
    """Return the pressure, Pa, at a pressure altitude, m, up to 20 km in the ICAO atmosphere."""
    height = np.asarray(altitude, dtype=np.float64)
    low = np.minimum(height, TROPOPAUSE_HEIGHT)
    ratio = 1 - LAPSE_RATE * low / SEA_LEVEL_TEMPERATURE
    above = np.maximum(height - TROPOPAUSE_HEIGHT, 0.0)
    isothermal = np.exp(-GRAVITY * above / (DRY_AIR * TROPOPAUSE_TEMPERATURE))
    return np.asarray(SEA_LEVEL_PRESSURE * ratio ** (1 / EXPONENT) * isothermal)


def heights_above_first(pressure: Values, virtual: Values) -> np.ndarray:
    """Return the hydrostatic height of every level above the first, geopotential m.

    The virtual temperature is linear in the logarithm of pressure between levels.

    Args:
        pressure: (N,) decreasing, any unit.
        virtual: (N,) virtual temperature, K.
    """
    logarithm = np.log(np.asarray(pressure, dtype=np.float64))
    warmth = np.asarray(virtual, dtype=np.float64)
    layers = -np.diff(logarithm) * (warmth[1:] + warmth[:-1]) / 2 * DRY_AIR / GRAVITY
    return np.concatenate(([0.0], np.cumsum(layers)))
