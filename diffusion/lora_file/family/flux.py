"""FLUX.1: double and single stream blocks (Black Forest Labs, 2024)."""

from typing import NamedTuple

from diffusion.lora_file.family.layers import (
    Family,
    Placed,
    Widths,
    expand,
    fused_layers,
    place,
    resolve,
)

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
MLP = 4  # widths of the hidden layer of a feed-forward network

_DOUBLE_LAYERS: dict[str, tuple[Widths, Widths]] = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
    "ff.net.0.proj": (1, MLP),
    "ff.net.2": (MLP, 1),
    "norm1.linear": (1, 6),
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_add_out": (1, 1),
    "ff_context.net.0.proj": (1, MLP),
    "ff_context.net.2": (MLP, 1),
    "norm1_context.linear": (1, 6),
}
_SINGLE_LAYERS: dict[str, tuple[Widths, Widths]] = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "proj_mlp": (1, MLP),
    "proj_out": (1 + MLP, 1),
    "norm.linear": (1, 3),
}
OUTER: dict[str, tuple[Widths, Widths]] = {
    "x_embedder": (None, 1),
    "context_embedder": (None, 1),
    "time_text_embed.timestep_embedder.linear_1": (None, 1),
    "time_text_embed.timestep_embedder.linear_2": (1, 1),
    "time_text_embed.guidance_embedder.linear_1": (None, 1),
    "time_text_embed.guidance_embedder.linear_2": (1, 1),
    "time_text_embed.text_embedder.linear_1": (None, 1),
    "time_text_embed.text_embedder.linear_2": (1, 1),
    "norm_out.linear": (1, 2),
    "proj_out": (1, None),
}
"""Layers outside of the blocks."""

_FUSED_DOUBLE = {
    "attn.a_to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.a_to_out": ("attn.to_out.0",),
    "ff_a.0": ("ff.net.0.proj",),
    "ff_a.2": ("ff.net.2",),
    "norm1_a.linear": ("norm1.linear",),
    "attn.b_to_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.b_to_out": ("attn.to_add_out",),
    "ff_b.0": ("ff_context.net.0.proj",),
    "ff_b.2": ("ff_context.net.2",),
    "norm1_b.linear": ("norm1_context.linear",),
}
_FUSED_SINGLE = {
    "to_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "proj_out": ("proj_out",),
    "norm.linear": ("norm.linear",),
}


FLUX = Family(
    "flux",
    {f"{DOUBLE}.{{i}}.{name}": sizes for name, sizes in _DOUBLE_LAYERS.items()}
    | {f"{SINGLE}.{{i}}.{name}": sizes for name, sizes in _SINGLE_LAYERS.items()}
    | OUTER,
    (
        *fused_layers(_FUSED_DOUBLE, "blocks", DOUBLE),
        *fused_layers(_FUSED_SINGLE, "single_blocks", SINGLE),
    ),
)


class FluxShape(NamedTuple):
    """The numbers that the layers of a FLUX.1 model follow from; the defaults are FLUX.1-dev.

    Attributes:
        num_layers: Double stream blocks.
        num_single_layers: Single stream blocks.
        num_heads: Attention heads.
        head_dim: Features of a head.
        in_channels: Features of an image token.
        context_dim: Features of a text token.
        pooled_dim: Features of the pooled text.
        time_dim: Features of the sinusoidal time.
        out_channels: Features of the prediction.
        guidance: Whether the guidance strength is embedded.
    """

    num_layers: int = 19
    num_single_layers: int = 38
    num_heads: int = 24
    head_dim: int = 128
    in_channels: int = 64
    context_dim: int = 4096
    pooled_dim: int = 768
    time_dim: int = 256
    out_channels: int = 64
    guidance: bool = True

    @property
    def width(self) -> int:
        """Features of a token within the model."""
        return self.num_heads * self.head_dim

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of every linear layer, by diffusers name."""
        free = {
            "x_embedder": self.in_channels,
            "context_embedder": self.context_dim,
            "time_text_embed.timestep_embedder.linear_1": self.time_dim,
            "time_text_embed.guidance_embedder.linear_1": self.time_dim,
            "time_text_embed.text_embedder.linear_1": self.pooled_dim,
            "proj_out": self.out_channels,
        }
        names = [name for name in OUTER if self.guidance or "guidance" not in name]
        names += expand(FLUX.layers, DOUBLE, self.num_layers)
        names += expand(FLUX.layers, SINGLE, self.num_single_layers)
        return resolve(FLUX, names, self.width, free)

    def fused(self) -> list[Placed]:
        """Return the fused layers of all blocks, in the order of the published encoder."""
        counts = {"blocks": self.num_layers, "single_blocks": self.num_single_layers}
        return place(FLUX, counts, self.modules())
