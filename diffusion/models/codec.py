"""Images and captions as a model sees them, for the embedded base and pipelines of diffusers."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.models.base import EmbeddedBase
from diffusion.models.text import TextEncoder, TextStates


class Codec(Protocol):
    """What stands between images, captions and a transformer.

    Attributes:
        transformer: Of FLUX or SD3.
        family: ``flux`` or ``sd3``.
        size: Side of images in pixels.
    """

    transformer: nn.Module
    family: str
    size: int

    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the transformer sees them."""

    def states(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""


FAMILIES = {"FluxPipeline": "flux", "StableDiffusion3Pipeline": "sd3"}
"""Pipeline -> family."""


class EmbeddedCodec:
    """That of an embedded base.

    Args:
        base: The base.
        text: Its text encoder.

    Raises:
        GatesError: The base was trained with another text encoder.
    """

    family = "flux"

    def __init__(self, base: EmbeddedBase, text: TextEncoder) -> None:
        base.check_text_encoder(text)
        self.base, self.text = base, text
        self.transformer: nn.Module = base.transformer
        self.size = base.size

    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the transformer sees them."""
        return self.base.latents(images)

    def states(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""
        return self.text.encode(captions)


class PipelineCodec:
    """That of a ``FluxPipeline`` or ``StableDiffusion3Pipeline``.

    Args:
        pipeline: With text encoders and autoencoder.
        size: Side of images in pixels.

    Raises:
        GatesError: It is another pipeline, or lacks a part.
    """

    def __init__(self, pipeline: Any, size: int = 1024) -> None:
        name = type(pipeline).__name__
        if name not in FAMILIES:
            raise GatesError(f"{name} is no pipeline of {' or '.join(FAMILIES)}")
        lacking = [
            part for part in ("vae", "text_encoder") if getattr(pipeline, part, None) is None
        ]
        if lacking:
            raise GatesError(f"the pipeline has no {lacking[0]}: give one with all its parts")
        self.pipeline, self.family, self.size = pipeline, FAMILIES[name], size
        self.transformer: nn.Module = pipeline.transformer

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the transformer sees them."""
        vae = self.pipeline.vae
        found = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return (found - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""
        given = list(captions)
        if self.family == "flux":
            tokens, pooled, _ = self.pipeline.encode_prompt(given, given)
        else:
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                given, given, given, do_classifier_free_guidance=False
            )
        return TextStates(tokens, pooled)
