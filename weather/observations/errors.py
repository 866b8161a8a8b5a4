"""Observation errors of reports that state none.

Standard deviations of the size that operational centers assign to radiosondes and stations; they
include what a report and a cell of some 100 km differ by. A file that states errors keeps its own.
"""

from collections.abc import Mapping

import numpy as np

from weather.observations.conversions import saturation_pressure, specific_humidity

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
