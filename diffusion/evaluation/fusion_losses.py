"""How well several adapters work together, and what flow matching can do without a network."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.fusion.protocol import Fusion
from diffusion.models.flow_matching import Noised, flow_matching_losses, noised
from diffusion.models.text_encoders import TextStates

BATCH = 64  # latents at a time


@torch.no_grad()
def fixed_losses(
    transformer: nn.Module,
    fusion: Fusion | None,
    latents: Tensor,
    text: TextStates,
    *,
    steps: int = 8,
    run: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the flow-matching loss of each latent (N,), its mean over fixed times.

    Times are the midpoints of the steps of a sampling run, from noise to image, and the fusion is
    told the step that each belongs to. Noise is drawn once for each latent and time, so any method
    with the same seed sees the same.

    Args:
        transformer: A ``FluxTransformer2DModel`` or ``SD3Transformer2DModel``.
        fusion: Adapters of it, attached here unless they are; None for the model alone.
        latents: (N, C, h, w).
        text: Of their N captions.
        steps: Number of times.
        run: Steps of the sampling run, of which the nearest to each time is told; ``steps`` if
            None.
        seed: Of the noise.

    Raises:
        GatesError: There are no steps, or numbers of latents and captions differ.
    """
    if steps < 1 or len(latents) != len(text.pooled):
        raise GatesError(
            f"losses need a step and a caption for each latent, found {steps} steps,"
            f" {len(latents)} latents and {len(text.pooled)} captions"
        )
    total, length = latents.new_zeros(len(latents)), run or steps
    with nullcontext() if fusion is None or fusion.attached else fusion:
        for step, found in enumerate(fixed_draws(latents, steps, seed)):
            if fusion is not None:
                fusion.at(int((step + 0.5) * length / steps), length)
            for start in range(0, len(latents), BATCH):
                rows = slice(start, start + BATCH)
                at = Noised(*(part[rows] for part in found))
                total[rows] += flow_matching_losses(transformer, at, text.of(rows))
    return total / steps


def fixed_draws(latents: Tensor, steps: int, seed: int) -> Iterator[Noised]:
    """Yield the noised latents of fixed times, from noise to image.

    Args:
        latents: (N, C, h, w).
        steps: Number of times.
        seed: Of the noise.
    """
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        time = latents.new_full((len(latents),), 1 - (step + 0.5) / steps)
        yield noised(latents, time, noise)


SHRINKAGE = 0.02  # what is added to variances, in mean variances


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
