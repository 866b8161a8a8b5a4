"""The embedded base: a FLUX of 5.25 M parameters for images of 32 by 32."""

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from diffusion.models.autoencoder import PatchAutoencoder

TINY: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
"""Arguments of ``FluxTransformer2DModel``: width 192, 16 image tokens."""

UNIT: dict[str, Any] = TINY | {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}
"""The same at width 32 with two blocks, for tests."""

SHAPES = {"tiny": TINY, "unit": UNIT}


def transformer_of(shape: str) -> Any:
    """Return an untrained transformer of a named shape."""
    return FluxTransformer2DModel(**SHAPES[shape])


def pipeline_of(transformer: Any, vae: PatchAutoencoder) -> Any:
    """Return the unmodified pipeline of diffusers, which is given states of captions.

    Its prompts are ``prompt_embeds`` and ``pooled_prompt_embeds``, and those of the empty caption
    as negative ones, see :class:`diffusion.models.text.TextEncoder`.
    """
    pipeline: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
