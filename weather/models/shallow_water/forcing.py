"""What drives the shallow-water model: jets, mountains and a stirring pattern."""

import math

import torch
from torch import Tensor

from weather.grid import EARTH_RADIUS_KM, Grid, great_circle_km
from weather.models.noise import random_coefficients
from weather.spherical import SphericalTransform

JETS = ((45.0, 60.0), (-45.0, 54.0))
"""Center (degrees) and peak (m/s) of the jets that the flow relaxes to."""

JET_HALF_WIDTH = math.pi / 7.5
"""Distance in latitude, rad, at which a jet vanishes."""

MOUNTAINS = ((45.0, 90.0, 1000.0, 15.0), (40.0, 250.0, 800.0, 12.0), (-25.0, 290.0, 600.0, 10.0))
"""Latitude, longitude (degrees), height (m) and e-folding radius (degrees) of the mountains."""

STIRRED_DEGREES = (5, 12)
"""Smallest and largest total wavenumber that is stirred."""


def jet_profile(grid: Grid) -> Tensor:
    """Return the eastward wind (H, W), m/s, of the jets, smooth and of compact support.

    A jet is ``peak exp(1 - 1 / (1 - x**2))`` for ``|x| < 1``, where x is the distance in latitude
    from its center over the half width (the profile of Galewsky et al., 2004).
    """
    wind = torch.zeros_like(grid.latitude)
    for center, peak in JETS:
        distance = (grid.latitude - center).deg2rad() / JET_HALF_WIDTH
        inside = (1 - distance.square()).clamp(min=1e-6)
        wind += torch.where(distance.abs() < 1, peak * torch.exp(1 - 1 / inside), 0.0)
    return wind[:, None].expand(grid.shape)


def mountain_heights(grid: Grid) -> Tensor:
    """Return the height (H, W), m, of the Gaussian mountains."""
    heights = torch.zeros(grid.shape, dtype=torch.float64)
    for latitude, longitude, peak, radius in MOUNTAINS:
        place = grid.latitude.new_tensor([latitude, longitude])
        distance = great_circle_km(grid.latitude[:, None], grid.longitude, place[0], place[1])
        degrees = (distance / EARTH_RADIUS_KM).rad2deg()
        heights += peak * torch.exp(-(degrees / radius).square())
    return heights


def stirring_pattern(transform: SphericalTransform, seed: int) -> Tensor:
    """Return a fixed random pattern (1, M, L), complex coefficients, of mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    return random_coefficients(transform, STIRRED_DEGREES, generator)[None]
