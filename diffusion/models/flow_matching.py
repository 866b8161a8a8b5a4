"""Flow matching: what a transformer predicts, and how far it is off (Lipman et al., 2023)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from core_gates.numerics import accumulation_dtype
from diffusion.models.text import TextStates

GUIDANCE = 3.0
"""Scale of classifier-free guidance of the embedded base."""


class Noised(NamedTuple):
    """Latents on the way to noise.

    Attributes:
        x: (B, C, h, w) ``(1 - t) z + t ε``.
        t: (B,) from 0, the image, to 1, noise.
        target: (B, C, h, w) ``ε - z``, the velocity.
    """

    x: Tensor
    t: Tensor
    target: Tensor


def logit_normal(count: int, device: torch.device | None = None) -> Tensor:
    """Return times (count,) whose logits are normal, from the global generator."""
    return torch.randn(count, device=device).sigmoid()


def noised(latents: Tensor, t: Tensor, noise: Tensor) -> Noised:
    """Return latents (B, C, h, w) at times (B,) on the way to noise of their shape."""
    at = t.view(-1, 1, 1, 1)
    return Noised(torch.lerp(latents, noise, at), t, noise - latents)


def packed(latents: Tensor) -> Tensor:
    """Return tokens (B, h/2 · w/2, 4C) of latents (B, C, h, w), as FLUX arranges them."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return latents (B, C, height, width) of their tokens."""
    batch, _, features = tokens.shape
    blocks = tokens.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def velocity(transformer: nn.Module, x: Tensor, t: Tensor, text: TextStates) -> Tensor:
    """Return what a FLUX or SD3 transformer predicts (B, C, h, w).

    Args:
        transformer: A ``FluxTransformer2DModel`` or ``SD3Transformer2DModel``.
        x: (B, C, h, w) latents.
        t: (B,) times from 0 to 1.
        text: Captions of the batch.
    """
    if type(transformer).__name__.startswith("SD3"):
        return transformer(  # type: ignore[no-any-return]
            hidden_states=x,
            timestep=t * 1000,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
    height, width = x.shape[2:]
    guidance = None
    if transformer.config.guidance_embeds:  # type: ignore[union-attr]
        guidance = torch.ones_like(t)
    found = transformer(
        hidden_states=packed(x),
        timestep=t,
        guidance=guidance,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.tokens,
        txt_ids=x.new_zeros(text.tokens.shape[1], 3),
        img_ids=image_ids(height // 2, width // 2, x),
        return_dict=False,
    )[0]
    return unpacked(found, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Return the places (height · width, 3) of image tokens: 0, row, column."""
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device).unsqueeze(1)
    ids[..., 2] = torch.arange(width, device=like.device)
    return ids.view(-1, 3)


def flow_matching_losses(transformer: nn.Module, at: Noised, text: TextStates) -> Tensor:
    """Return the mean squared error of the velocity of each latent (B,)."""
    found = velocity(transformer, at.x, at.t, text)
    dtype = accumulation_dtype(found, at.target)
    return (found.to(dtype) - at.target.to(dtype)).square().flatten(1).mean(1)
