"""The best linear denoiser of some images: what flow matching can do without a network."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from core_gates.errors import GatesError

SHRINKAGE = 0.02
"""What is added to variances, in mean variances."""


class LinearDenoiser(NamedTuple):
    """Predicts velocities as if latents were normal: it knows their mean and covariance alone.

    With ``x = (1 - t) z + t ε`` and ``z ~ N(μ, C)`` the expected velocity is linear in ``x``::

        r = ((1 - t)² C + t² I)⁻¹ (x - (1 - t) μ)
        E[ε - z | x] = t r - μ - (1 - t) C r

    Attributes:
        mean: (D,) of the latents.
        covariance: (D, D) of the latents.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> Self:
        """Return that of latents (N, ...).

        Raises:
            GatesError: There are fewer than two.
        """
        if len(latents) < 2:
            raise GatesError(f"a covariance needs two latents at least, found {len(latents)}")
        rows = latents.flatten(1).double()
        covariance = torch.cov(rows.mT)
        ridge = SHRINKAGE * covariance.diagonal().mean()
        return cls(rows.mean(0), covariance + ridge * torch.eye(rows.shape[1]).double())

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Return the expected velocity of noised latents (B, ...).

        Args:
            x: Latents on the way to noise.
            t: Their time, above 0 and at most 1.
        """
        size = len(self.mean)
        total = (1 - t) ** 2 * self.covariance + t**2 * torch.eye(size).double()
        off = x.flatten(1).double() - (1 - t) * self.mean
        r = torch.linalg.solve(total, off.mT).mT
        found = t * r - self.mean - (1 - t) * (r @ self.covariance)
        return found.view_as(x).to(x)
