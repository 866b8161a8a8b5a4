"""Zonal energy spectra, as WeatherBench 2 defines them."""

import math

import torch
from torch import Tensor

from weather.metrics.regions import spatial_mean

_MEAN_RADIUS_M = 6_367_500.0  # mean of 6357 and 6378 km, the radius of WeatherBench 2


def circumference(latitude: Tensor) -> Tensor:
    """Return the length of parallels, m, at latitudes in degrees."""
    return 2 * math.pi * _MEAN_RADIUS_M * latitude.deg2rad().cos()


def zonal_energy_spectrum(field: Tensor, latitude: Tensor) -> Tensor:
    """Return the energy density of every zonal wavenumber.

    Its sum over wavenumbers is the integral of the squared field along the parallel; for an even
    W the last wavenumber counts double, as in WeatherBench 2.

    Args:
        field: (..., H, W) at equidistant longitudes.
        latitude: (H,) degrees.

    Returns:
        (..., H, W // 2 + 1).
    """
    coefficients: Tensor = torch.fft.rfft(field, norm="forward")
    power: Tensor = coefficients.real.square() + coefficients.imag.square()
    power[..., 1:] *= 2
    return power * circumference(latitude).to(power)[:, None]


def zonal_wavelength(latitude: Tensor, num_longitudes: int) -> Tensor:
    """Return the wavelength (H, W // 2 + 1), m, of every wavenumber; infinite for zero."""
    wavenumber = torch.arange(num_longitudes // 2 + 1, dtype=latitude.dtype)
    return circumference(latitude)[:, None] / wavenumber


def mean_spectrum(field: Tensor, latitude: Tensor, weights: Tensor) -> Tensor:
    """Average `zonal_energy_spectrum` over latitudes, for example of analysis increments.

    Args:
        field: (..., H, W).
        latitude: (H,) degrees.
        weights: (H,) area weights.

    Returns:
        (..., W // 2 + 1).
    """
    spectrum = zonal_energy_spectrum(field, latitude)
    return spatial_mean(spectrum.transpose(-2, -1).unsqueeze(-1), weights)
