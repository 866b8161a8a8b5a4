"""Images and captions as a model sees them, for the embedded base and pipelines of diffusers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.data.folders import read_image
from diffusion.models.base import EmbeddedBase
from diffusion.models.loading import load_pipeline
from diffusion.models.text import TextEncoder, TextStates, text_encoder


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

    def release(self) -> None:
        """Give up what only encodes, so that its memory is free for the training."""


BATCH = 8
"""Images, or captions, that are encoded at a time."""

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

    def release(self) -> None:
        """Give up nothing: all is small."""


class PipelineCodec:
    """That of a ``FluxPipeline`` or ``StableDiffusion3Pipeline``.

    Args:
        pipeline: With text encoders and autoencoder, which :meth:`release` gives up.
        size: Side of images in pixels.

    Raises:
        GatesError: It is another pipeline, lacks a part, or cannot make images of this size.
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
        step = pipeline.vae_scale_factor * 2
        if size < step or size % step:
            raise GatesError(f"images of {size} pixels do not suit {name}: a multiple of {step}")
        self.pipeline, self.family, self.size = pipeline, FAMILIES[name], size
        self.transformer: nn.Module = pipeline.transformer

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the transformer sees them, in float32."""
        vae = self.pipeline.vae
        found = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        shifted = found - (vae.config.shift_factor or 0)
        return (shifted * vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions, in float32."""
        parts = [
            self._states(list(captions[start : start + BATCH]))
            for start in range(0, len(captions), BATCH)
        ]
        return TextStates(
            torch.cat([tokens for tokens, _ in parts]), torch.cat([pooled for _, pooled in parts])
        )

    def _states(self, given: list[str]) -> tuple[Tensor, Tensor]:
        if self.family == "flux":
            tokens, pooled, _ = self.pipeline.encode_prompt(given, given)
        else:
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                given, given, given, do_classifier_free_guidance=False
            )
        return tokens.float().cpu(), pooled.float().cpu()

    def release(self) -> None:
        """Give up what only encodes, so that its memory is free for the training."""
        for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            if hasattr(self.pipeline, part):
                setattr(self.pipeline, part, None)


def load_codec(folder: str | Path, size: int | None = None) -> Codec:
    """Return the codec of a base, its transformer frozen and in the main memory.

    Args:
        folder: Of an embedded base, or of a ``FluxPipeline`` or ``StableDiffusion3Pipeline`` as
            diffusers saves it.
        size: Side of images in pixels; that of the embedded base, else 1024, if None.

    Raises:
        GatesError: There is no such base, or it makes no images of this size.
    """
    loaded = load_pipeline(folder, device="cpu")
    if loaded.base is None:
        return PipelineCodec(loaded.pipe, 1024 if size is None else size)
    if size not in (None, loaded.base.size):
        raise GatesError(f"{folder} makes images of {loaded.base.size} pixels, not of {size}")
    return EmbeddedCodec(loaded.base, text_encoder(loaded.base.text_encoder["name"]))


def latents_of(codec: Codec, images: Sequence[Path]) -> Tensor:
    """Return the latents (N, C, h, w) of image files, of which few are in memory at a time.

    Raises:
        GatesError: A file is no image, damaged or too large.
    """
    return torch.cat(
        [
            codec.latents(torch.stack([read_image(one, codec.size) for one in part]))
            for part in (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        ]
    )
