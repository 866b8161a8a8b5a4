"""Forcing of Held and Suarez (1994, Bull. Amer. Meteor. Soc. 75, 1825-1830)."""

import torch
from torch import Tensor

from weather.models.earth import DAY, KAPPA

REFERENCE_PRESSURE = 1e5
"""Pa."""

BOUNDARY_LAYER_TOP = 0.7
"""Sigma; friction and the faster relaxation act below, towards the surface."""

FRICTION_RATE = 1 / DAY
"""At the surface, s-1."""

RELAXATION_RATE = 1 / (40 * DAY)
"""In the free atmosphere, s-1."""

SURFACE_RELAXATION_RATE = 1 / (4 * DAY)
"""At the surface of the equator, s-1."""

STRATOSPHERE = 200.0
"""Lowest equilibrium temperature, K."""

EQUATOR = 315.0
"""Equilibrium temperature at the surface of the equator, K."""

EQUATOR_TO_POLE = 60.0
"""Its fall to the pole, K."""

STABILITY = 10.0
"""Rise of equilibrium potential temperature over a factor e in pressure at the equator, K."""


def friction_rates(sigma: Tensor) -> Tensor:
    """Return the damping rate of the wind, s-1, at sigma of any shape."""
    return FRICTION_RATE * _depth(sigma)


def relaxation_rates(sigma: Tensor, latitude: Tensor) -> Tensor:
    """Return the relaxation rate of temperature, s-1; the arguments (latitude in rad) broadcast."""
    faster = (SURFACE_RELAXATION_RATE - RELAXATION_RATE) * _depth(sigma) * latitude.cos() ** 4
    return RELAXATION_RATE + faster


def equilibrium_temperature(log_pressure: Tensor, sigma: Tensor, latitude: Tensor) -> Tensor:
    """Return the temperature that the atmosphere relaxes to (..., L), K.

    It is ``max(200, (315 - 60 sin2 lat - 10 ln(p/p0) cos2 lat) (p/p0)**kappa)``.

    Args:
        log_pressure: ln(surface pressure / 1e5 Pa) (...).
        sigma: Pressure over surface pressure in all layers (L,).
        latitude: Latitudes, rad, that broadcast with the surface pressure.
    """
    exner = sigma.pow(KAPPA)
    ratio = (KAPPA * log_pressure).exp()
    slope = -STABILITY * latitude.cos().square()
    surface = torch.addcmul(
        EQUATOR - EQUATOR_TO_POLE * latitude.sin().square(), slope, log_pressure
    )
    target = (ratio * surface).unsqueeze(-1) * exner
    target = torch.addcmul(target, (ratio * slope).unsqueeze(-1), exner * sigma.log())
    return target.clamp_(min=STRATOSPHERE)


def _depth(sigma: Tensor) -> Tensor:
    return ((sigma - BOUNDARY_LAYER_TOP) / (1 - BOUNDARY_LAYER_TOP)).clamp(min=0)
