"""From what instruments report to what models carry, and the hydrostatic check of soundings.

Heights and temperatures of a layer must agree (Gandin).
"""

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
    ratio = 1 - LAPSE_RATE * np.minimum(height, TROPOPAUSE_HEIGHT) / SEA_LEVEL_TEMPERATURE
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


TOLERANCE, GAP_TOLERANCE = 0.01, 0.02  # of the thickness: always, and per gap in ln(pressure)
ROUNDING_M = 10.0
ROUNDING_HPA, FINE_ROUNDING_HPA, FINE_HPA = 0.5, 0.05, 100.0
THINNEST = 0.05  # of a checked layer, in ln(pressure): thinner ones are dominated by rounding


def inconsistent_levels(
    pressure: np.ndarray, height: np.ndarray, virtual: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which heights and which temperatures of a sounding fail the hydrostatic check.

    Checked are layers of at least `THINNEST` between levels that have height and temperature; the
    temperatures of all levels within take part. A layer fails where its thickness departs by more
    than 10 m, what rounded pressures leave open, and 1 % plus 2 % per scale height of the widest
    gap between temperatures, in which they need not be linear. A level whose height, moved by one
    distance, would reconcile both of its layers has a wrong height. A layer that fails otherwise
    cannot be attributed: heights and temperatures at both ends, and temperatures within, are
    rejected.

    Args:
        pressure: (N,) hPa, in any order.
        height: (N,) geopotential m, NaN where missing.
        virtual: (N,) virtual temperature, K, NaN where missing.

    Returns:
        Two boolean arrays (N,).
    """
    bad_height, bad_temperature = np.zeros((2, len(pressure)), dtype=bool)
    warm = np.flatnonzero(np.isfinite(pressure) & np.isfinite(virtual))
    warm = warm[np.argsort(-pressure[warm], kind="stable")]
    if len(warm) < 2:
        return bad_height, bad_temperature
    climb = heights_above_first(pressure[warm], virtual[warm])
    ends = _ends(pressure[warm], np.isfinite(height[warm]))
    if len(ends) < 2:
        return bad_height, bad_temperature
    open_height = _rounding(pressure[warm], virtual[warm])
    expected = np.diff(climb[ends])
    departure = np.diff(height[warm[ends]]) - expected
    rounding = open_height[ends[1:]] + open_height[ends[:-1]]
    logarithm = -np.log(pressure[warm])
    gaps = np.maximum.reduceat(np.diff(logarithm)[: ends[-1]], ends[:-1])
    fraction = TOLERANCE + GAP_TOLERANCE * gaps
    failed = np.abs(departure) > fraction * expected + ROUNDING_M + rounding
    for layer in map(int, np.flatnonzero(failed)):
        if _one_height(departure, failed, layer):
            bad_height[warm[ends[layer + 1]]] = True
        elif not (layer and _one_height(departure, failed, layer - 1)):
            bad_height[warm[ends[layer : layer + 2]]] = True
            bad_temperature[warm[ends[layer] : ends[layer + 1] + 1]] = True
    good = ends[~bad_height[warm[ends]]]
    bad_height[warm[_away(height[warm] - climb, climb, good, open_height, logarithm)]] = True
    return bad_height, bad_temperature


def _rounding(pressure: np.ndarray, virtual: np.ndarray) -> np.ndarray:
    """Return the height that the rounding of a pressure stands for, m."""
    return (
        np.where(pressure < FINE_HPA, FINE_ROUNDING_HPA, ROUNDING_HPA)
        / pressure
        * virtual
        * DRY_AIR
        / GRAVITY
    )


def _away(
    offset: np.ndarray,
    climb: np.ndarray,
    good: np.ndarray,
    rounding: np.ndarray,
    logarithm: np.ndarray,
) -> np.ndarray:
    """Return levels whose height agrees with neither of the nearest checked levels around them.

    Args:
        offset: (N,) reported minus hydrostatic height, NaN where there is none.
        climb: (N,) hydrostatic height.
        good: Levels that have passed, ascending.
        rounding: (N,) height that rounded pressures leave open.
        logarithm: (N,) -ln(pressure).
    """
    if not len(good):
        return np.zeros(0, dtype=int)
    place = np.searchsorted(good, np.arange(len(offset)))
    below, above = good[np.maximum(place - 1, 0)], good[np.minimum(place, len(good) - 1)]

    def near(end: np.ndarray) -> np.ndarray:
        fraction = TOLERANCE + GAP_TOLERANCE * np.abs(logarithm - logarithm[end])
        most = fraction * np.abs(climb - climb[end]) + ROUNDING_M + rounding + rounding[end]
        return np.abs(offset - offset[end]) <= most

    return np.flatnonzero(np.isfinite(offset) & ~near(below) & ~near(above))


def _one_height(departure: np.ndarray, failed: np.ndarray, layer: int) -> bool:
    """Return whether the level above a layer explains the departures of it and of the next."""
    if layer + 1 >= len(departure) or not (failed[layer] and failed[layer + 1]):
        return False
    return bool(
        abs(departure[layer] + departure[layer + 1])
        <= max(2 * ROUNDING_M, 0.2 * abs(departure[layer]))
    )


def _ends(pressure: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return levels with a height that are at least the thinnest layer apart, from below."""
    ends: list[int] = []
    for level in map(int, np.flatnonzero(high)):
        if not ends or np.log(pressure[ends[-1]] / pressure[level]) >= THINNEST:
            ends.append(level)
    return np.array(ends, dtype=int)
