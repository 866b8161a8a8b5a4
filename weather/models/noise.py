"""Random fields on the sphere."""

import torch
from torch import Tensor

from weather.spherical import SphericalTransform


def random_coefficients(
    transform: SphericalTransform, degrees: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Return white Gaussian coefficients (M, L) in a band, scaled to mean square 1.

    Args:
        transform: The spherical transform.
        degrees: Smallest and largest total wavenumber.
        generator: Source of the numbers, which depend on the band alone, so that a pattern is
            the same at every truncation that holds the band.

    Raises:
        ValueError: The band does not fit into the truncation.
    """
    first, last = degrees
    if not 0 < first <= last <= transform.truncation:
        raise ValueError(
            f"total wavenumbers {first} to {last} do not fit into truncation {transform.truncation}"
        )
    draws = torch.randn(last + 1, last + 1, 2, generator=generator, dtype=torch.float64)
    draws[0, :, 1] = 0.0  # zonal means are real
    order = torch.arange(last + 1)[:, None]
    degree = torch.arange(last + 1)
    inside = (degree >= first) & (degree >= order)
    band = torch.view_as_complex(draws) * inside
    power = band.abs().square()
    power = power[0].sum() + 2 * power[1:].sum()
    coefficients = torch.zeros(transform.size, transform.size, dtype=torch.complex128)
    coefficients[: last + 1, : last + 1] = band / power.sqrt()
    return coefficients.to(transform.degree.device)
