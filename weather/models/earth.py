"""Physical constants of the planet (Williamson et al., 1992; Held and Suarez, 1994)."""

from weather.spherical import EARTH_RADIUS_M as RADIUS

GRAVITY = 9.80616
"""m s-2."""

ROTATION = 7.292e-5
"""Angular velocity, s-1."""

GAS_CONSTANT = 287.0
"""Gas constant of dry air, J kg-1 K-1."""

KAPPA = 2 / 7
"""Gas constant over heat capacity at constant pressure."""

DAY = 86400.0
"""Seconds of a day."""

__all__ = ["DAY", "GAS_CONSTANT", "GRAVITY", "KAPPA", "RADIUS", "ROTATION"]
