"""Spectral covariances by hand, where there are no samples to estimate them from."""

import torch

from weather.baselines.covariance import gaspari_cohn
from weather.baselines.spectral_covariance import SpectralCovariance
from weather.grid import EARTH_RADIUS_KM, gaussian_nodes
from weather.spherical import FieldLayout, legendre_functions


def univariate(transform, channels, deviation, *, length_km):
    """Give every channel the Gaspari-Cohn correlation, for when there are no samples.

    Winds get it in streamfunction and velocity potential, with as much energy in either.

    Args:
        transform: The spherical transform.
        channels: The C channels.
        deviation: (C,) standard deviations of the error.
        length_km: Half width c of the correlation.
    """
    layout, variance = FieldLayout.of(channels), deviation.double().square()
    scalar = correlation_spectrum(lambda km: gaspari_cohn(km / length_km), transform.truncation)
    energy = (2 * transform.degree + 1) * scalar * -transform.laplacian
    rotation = scalar * transform.laplacian.square() / energy.sum()  # of a unit wind
    east, north = variance[list(layout.eastward)], variance[list(layout.northward)]
    winds = rotation[:, None] * (east + north) / 2
    spectra = torch.cat((scalar[:, None] * variance[list(layout.scalars)], winds, winds), 1)
    return SpectralCovariance(transform, channels, spectra.diag_embed())


def correlation_spectrum(correlation, truncation):
    """Return the spectrum g (L,) of an isotropic correlation, ``sum of (2 l + 1) g_l = 1``.

    ``rho(angle) = sum of (2 l + 1) g_l P_l(cos angle)``; what rounding or the correlation makes
    negative is zero, and the rest is scaled to variance 1.

    Args:
        correlation: Function of distances, km.
        truncation: T, the largest total wavenumber.
    """
    nodes, weights = gaussian_nodes(4 * truncation + 200)
    degree = torch.arange(truncation + 1, dtype=torch.float64)
    legendre = legendre_functions(truncation, nodes)[0][0] / (2 * degree + 1).sqrt()[:, None]
    values = correlation(nodes.acos() * EARTH_RADIUS_KM)
    spectrum = (legendre * (weights * values)).sum(1).clamp(min=0.0) / 2
    return spectrum / ((2 * degree + 1) * spectrum).sum()


class DenseControl:
    """The symmetric square root of a covariance matrix, for states of some thousand values.

    Args:
        matrix: B (n, n); eigenvalues below zero, which rounding leaves, count as zero.
    """

    def __init__(self, matrix):
        values, vectors = torch.linalg.eigh(matrix.double())
        self._root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
        self.size = self.num_controls = len(matrix)

    def increment(self, control):
        """Return ``U v`` (N, n) of control vectors (N, n)."""
        return control @ self._root


def gradient_error(cost, control, *, step, seed=0):
    """Return the relative error of the gradient of the first cost in a random direction.

    The derivative is compared with central differences of fourth order. It is the gradient test of
    Navon et al. (1992), for a model of the user.

    Args:
        cost: The costs.
        control: (k,) float64, where the gradient is tested.
        step: Length of a step in the direction, whose length is 1.
        seed: Draws the direction.
    """
    first = torch.zeros(1, dtype=torch.long)
    point = control.detach().clone().requires_grad_()
    direction = torch.randn(
        len(control), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    direction /= direction.norm()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(cost(point[None], first).sum(), point)
    slope = float(gradient @ direction)
    steps = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64) * step
    with torch.no_grad():
        at = [float(cost((control + s * direction)[None], first)) for s in steps]
    numeric = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)
    return abs(slope - numeric) / abs(slope)
