"""Linear balance: the height that goes with a rotational wind."""

import torch
from torch import Tensor

from weather.models.earth import GRAVITY, ROTATION
from weather.spherical import SphericalTransform


class LinearBalance:
    """The height field in linear balance with a vorticity.

    It solves ``g laplacian(h) = div(f grad(psi))`` with the streamfunction psi: geostrophic balance
    on a sphere, without its singularity at the equator (Lorenz 1960; Parrish and Derber 1992).

    Args:
        transform: The spherical transform.
    """

    def __init__(self, transform: SphericalTransform) -> None:
        self.transform = transform
        laplacian = transform.laplacian[:, None]
        self._inverse = torch.where(laplacian < 0, 1 / laplacian, 0.0)
        self._coriolis = 2 * ROTATION * transform.grid.latitude.deg2rad().sin()[:, None]

    def height(self, vorticity: Tensor) -> Tensor:
        """Return the height (2, M, L, K), m, of a vorticity (2, M, L, K), s-1; its mean is zero."""
        transform = self.transform
        winds = transform.gradient_synthesis(vorticity * self._inverse)
        x, y = (transform.fourier(self._coriolis * wind) for wind in winds)
        return transform.divergence(x, y) * self._inverse / GRAVITY
