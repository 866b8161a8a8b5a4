"""How well several adapters work together, and what flow matching can do without a network."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.fusion.protocol import Fusion
from diffusion.models.flow_matching import Noised, flow_matching_losses, noised
from diffusion.models.text_encoders import TextStates

BATCH = 64
"""Latents at a time."""


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


def _in_force(fusion: Fusion | None) -> AbstractContextManager[object]:
    return nullcontext() if fusion is None or fusion.attached else fusion
