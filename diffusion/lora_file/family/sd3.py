"""Stable Diffusion 3 and 3.5: joint blocks of two streams (Esser et al., 2024)."""

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

JOINT = "transformer_blocks"
MLP = 4

_LAYERS: dict[str, tuple[Widths, Widths]] = {
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
    "attn2.to_q": (1, 1),
    "attn2.to_k": (1, 1),
    "attn2.to_v": (1, 1),
    "attn2.to_out.0": (1, 1),
    "ff.net.0.proj": (1, MLP),
    "ff.net.2": (MLP, 1),
    "norm1.linear": (1, (6, 9)),  # 9 where the block has a second attention
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_add_out": (1, 1),
    "ff_context.net.0.proj": (1, MLP),
    "ff_context.net.2": (MLP, 1),
    "norm1_context.linear": (1, (6, 2)),  # 2 in the last block
}
OUTER: dict[str, tuple[Widths, Widths]] = {
    "context_embedder": (None, 1),
    "time_text_embed.timestep_embedder.linear_1": (None, 1),
    "time_text_embed.timestep_embedder.linear_2": (1, 1),
    "time_text_embed.text_embedder.linear_1": (None, 1),
    "time_text_embed.text_embedder.linear_2": (1, 1),
    "norm_out.linear": (1, 2),
    "proj_out": (1, None),
}
"""Linear layers outside of the blocks; the patch embedding is a convolution."""

_FUSED = {
    "attn.a_to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.a_to_out": ("attn.to_out.0",),
    "attn2.to_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.to_out": ("attn2.to_out.0",),
    "ff_a.0": ("ff.net.0.proj",),
    "ff_a.2": ("ff.net.2",),
    "norm1_a.linear": ("norm1.linear",),
    "attn.b_to_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.b_to_out": ("attn.to_add_out",),
    "ff_b.0": ("ff_context.net.0.proj",),
    "ff_b.2": ("ff_context.net.2",),
    "norm1_b.linear": ("norm1_context.linear",),
}
_LAST_LACKS = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")

SD3 = Family(
    "sd3",
    {f"{JOINT}.{{i}}.{name}": sizes for name, sizes in _LAYERS.items()} | OUTER,
    fused_layers(_FUSED, "blocks", JOINT),
)


class SD3Shape(NamedTuple):
    """The numbers that the layers of an SD3 model follow from; the defaults are SD3 medium.

    Attributes:
        num_layers: Joint blocks; the last one lacks the output of the text stream.
        num_heads: Attention heads.
        head_dim: Features of a head.
        context_dim: Features of a text token.
        pooled_dim: Features of the pooled text.
        time_dim: Features of the sinusoidal time.
        out_channels: Channels of the prediction.
        patch_size: Side of a patch.
        dual_attention: Blocks with a second attention, the first 13 of SD3.5 medium.
    """

    num_layers: int = 24
    num_heads: int = 24
    head_dim: int = 64
    context_dim: int = 4096
    pooled_dim: int = 2048
    time_dim: int = 256
    out_channels: int = 16
    patch_size: int = 2
    dual_attention: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Features of a token within the model."""
        return self.num_heads * self.head_dim

    def modules(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of every linear layer, by diffusers name."""
        last = f"{JOINT}.{self.num_layers - 1}."
        lacking = {last + name for name in _LAST_LACKS}
        names = expand(SD3.layers, JOINT, self.num_layers)
        names = [name for name in names if name not in lacking and self._has(name)]
        free = {
            "context_embedder": self.context_dim,
            "time_text_embed.timestep_embedder.linear_1": self.time_dim,
            "time_text_embed.text_embedder.linear_1": self.pooled_dim,
            "proj_out": self.patch_size**2 * self.out_channels,
        }
        for i in range(self.num_layers):
            dual = i in self.dual_attention
            free[f"{JOINT}.{i}.norm1.linear"] = (9 if dual else 6) * self.width
            free[f"{JOINT}.{i}.norm1_context.linear"] = 6 * self.width
        free[last + "norm1_context.linear"] = 2 * self.width
        return resolve(SD3, [*OUTER, *names], self.width, free)

    def fused(self) -> list[Placed]:
        """Return the fused layers of all blocks, in order."""
        return place(SD3, {"blocks": self.num_layers}, self.modules())

    def _has(self, name: str) -> bool:
        return ".attn2." not in name or int(name.split(".")[1]) in self.dual_attention
