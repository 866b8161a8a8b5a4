"""The hydrostatic check of soundings: heights and temperatures of a layer must agree (Gandin 1988).

The hypsometric equation turns the temperatures of a layer into its thickness. Sound radiosondes
depart from it by less than .6 % between mandatory levels, most of which is rounding: of heights to
10 m, and of pressures to 1 hPa, from 100 hPa upwards to .1 hPa. A wrong digit, sign or level
departs by more.
"""

import numpy as np

from weather.observations.conversions import DRY_AIR, heights_above_first
from weather.variables import GRAVITY

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
    size = np.where(pressure < FINE_HPA, FINE_ROUNDING_HPA, ROUNDING_HPA)
    return size / pressure * virtual * DRY_AIR / GRAVITY


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
    level = np.arange(len(offset))
    place = np.searchsorted(good, level)
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
    both = departure[layer] + departure[layer + 1]
    return bool(abs(both) <= max(2 * ROUNDING_M, 0.2 * abs(departure[layer])))


def _ends(pressure: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return levels with a height that are at least the thinnest layer apart, from below."""
    ends: list[int] = []
    for level in map(int, np.flatnonzero(high)):
        if not ends or np.log(pressure[ends[-1]] / pressure[level]) >= THINNEST:
            ends.append(level)
    return np.array(ends, dtype=int)
