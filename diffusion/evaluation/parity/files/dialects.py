"""How dialects of adapter files name the layers of FLUX.1 and SD3, by the definitions of formats.

Nothing here comes from the package that reads such files.
"""

from collections.abc import Sequence
from typing import NamedTuple

D = 16
"""Width of the models; two blocks of each kind."""

PREFIXES: dict[bool, tuple[str, ...]] = {
    False: (
        "",
        "transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
        "base_model.model.",
        "base_model.model.transformer.",
        "unet.",
        "pipe.dit.",
    ),
    True: ("lora_unet_", "lora_transformer_", "lycoris_"),
}
"""Whether a prefix replaces dots by underscores -> prefixes."""


class Layer(NamedTuple):
    """A layer as a dialect names it.

    Attributes:
        name: In the dialect.
        parts: The layers that it is in diffusers, with their rows.
        inputs: Its columns.
        swapped: Whether the two halves of its rows change places in diffusers.
    """

    name: str
    parts: dict[str, int]
    inputs: int
    swapped: bool = False


def block(
    native: str,
    own: str,
    theirs: dict[str, int],
    *,
    inputs: int = 1,
    swapped: bool = False,
) -> Layer:
    """Return a layer of block 0 or 1; ``theirs`` maps parts to rows in widths, as ``inputs``."""
    parts = {f"{own}.{part}": rows * D for part, rows in theirs.items()}
    return Layer(native, parts, inputs * D, swapped)


def _attention(prefix: str, names: Sequence[str]) -> dict[str, int]:
    return {f"{prefix}.{name}": 1 for name in names}


QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
TIME = "time_text_embed"
_T0, _T1, _S0, _S1 = (
    "transformer_blocks.0",
    "transformer_blocks.1",
    "single_transformer_blocks.0",
    "single_transformer_blocks.1",
)

BFL = [
    block("double_blocks.0.img_attn.qkv", _T0, _attention("attn", QKV)),
    block("double_blocks.1.txt_attn.qkv", _T1, _attention("attn", ADDED)),
    block("double_blocks.0.img_attn.proj", _T0, {"attn.to_out.0": 1}),
    block("double_blocks.0.txt_attn.proj", _T0, {"attn.to_add_out": 1}),
    block("double_blocks.1.img_mlp.0", _T1, {"ff.net.0.proj": 4}),
    block("double_blocks.1.img_mlp.2", _T1, {"ff.net.2": 1}, inputs=4),
    block("double_blocks.0.txt_mlp.0", _T0, {"ff_context.net.0.proj": 4}),
    block("double_blocks.0.txt_mlp.2", _T0, {"ff_context.net.2": 1}, inputs=4),
    block("double_blocks.0.img_mod.lin", _T0, {"norm1.linear": 6}),
    block("double_blocks.1.txt_mod.lin", _T1, {"norm1_context.linear": 6}),
    block("single_blocks.0.linear1", _S0, {**_attention("attn", QKV), "proj_mlp": 4}),
    block("single_blocks.1.linear2", _S1, {"proj_out": 1}, inputs=5),
    block("single_blocks.1.modulation.lin", _S1, {"norm.linear": 3}),
    Layer("img_in", {"x_embedder": D}, 48),
    Layer("txt_in", {"context_embedder": D}, 24),
    Layer("time_in.in_layer", {f"{TIME}.timestep_embedder.linear_1": D}, 32),
    Layer("time_in.out_layer", {f"{TIME}.timestep_embedder.linear_2": D}, D),
    Layer("vector_in.in_layer", {f"{TIME}.text_embedder.linear_1": D}, 20),
    Layer("vector_in.out_layer", {f"{TIME}.text_embedder.linear_2": D}, D),
    Layer("guidance_in.in_layer", {f"{TIME}.guidance_embedder.linear_1": D}, 32),
    Layer("guidance_in.out_layer", {f"{TIME}.guidance_embedder.linear_2": D}, D),
    Layer("final_layer.linear", {"proj_out": 48}, D),
    Layer("final_layer.adaLN_modulation.1", {"norm_out.linear": 2 * D}, D, swapped=True),
]
SD3 = [
    block("joint_blocks.0.x_block.attn.qkv", _T0, _attention("attn", QKV)),
    block("joint_blocks.0.context_block.attn.qkv", _T0, _attention("attn", ADDED)),
    block("joint_blocks.1.x_block.attn.proj", _T1, {"attn.to_out.0": 1}),
    block("joint_blocks.0.context_block.attn.proj", _T0, {"attn.to_add_out": 1}),
    block("joint_blocks.0.x_block.attn2.qkv", _T0, _attention("attn2", QKV)),
    block("joint_blocks.0.x_block.attn2.proj", _T0, {"attn2.to_out.0": 1}),
    block("joint_blocks.1.x_block.mlp.fc1", _T1, {"ff.net.0.proj": 4}),
    block("joint_blocks.1.x_block.mlp.fc2", _T1, {"ff.net.2": 1}, inputs=4),
    block("joint_blocks.0.context_block.mlp.fc1", _T0, {"ff_context.net.0.proj": 4}),
    block("joint_blocks.0.context_block.mlp.fc2", _T0, {"ff_context.net.2": 1}, inputs=4),
    block("joint_blocks.0.x_block.adaLN_modulation.1", _T0, {"norm1.linear": 9}),
    block("joint_blocks.1.x_block.adaLN_modulation.1", _T1, {"norm1.linear": 6}),
    block("joint_blocks.0.context_block.adaLN_modulation.1", _T0, {"norm1_context.linear": 6}),
    block(
        "joint_blocks.1.context_block.adaLN_modulation.1",
        _T1,
        {"norm1_context.linear": 2},
        swapped=True,
    ),
    Layer("context_embedder", {"context_embedder": D}, 24),
    Layer("t_embedder.mlp.0", {f"{TIME}.timestep_embedder.linear_1": D}, 32),
    Layer("t_embedder.mlp.2", {f"{TIME}.timestep_embedder.linear_2": D}, D),
    Layer("y_embedder.mlp.0", {f"{TIME}.text_embedder.linear_1": D}, 20),
    Layer("y_embedder.mlp.2", {f"{TIME}.text_embedder.linear_2": D}, D),
    Layer("final_layer.linear", {"proj_out": 64}, D),
    Layer("final_layer.adaLN_modulation.1", {"norm_out.linear": 2 * D}, D, swapped=True),
]
XLABS = [
    block("double_blocks.0.processor.qkv_lora1", _T0, _attention("attn", QKV)),
    block("double_blocks.1.processor.qkv_lora2", _T1, _attention("attn", ADDED)),
    block("double_blocks.0.processor.proj_lora1", _T0, {"attn.to_out.0": 1}),
    block("double_blocks.0.processor.proj_lora2", _T0, {"attn.to_add_out": 1}),
    block("single_blocks.0.processor.qkv_lora", _S0, _attention("attn", QKV)),
    block("single_blocks.1.processor.proj_lora", _S1, {"proj_out": 1}, inputs=5),
]
DIFFSYNTH = [
    block("blocks.0.attn.a_to_qkv", _T0, _attention("attn", QKV)),
    block("blocks.1.attn.b_to_qkv", _T1, _attention("attn", ADDED)),
    block("blocks.0.attn.a_to_out", _T0, {"attn.to_out.0": 1}),
    block("blocks.0.attn.b_to_out", _T0, {"attn.to_add_out": 1}),
    block("blocks.1.ff_a.0", _T1, {"ff.net.0.proj": 4}),
    block("blocks.1.ff_a.2", _T1, {"ff.net.2": 1}, inputs=4),
    block("blocks.0.ff_b.0", _T0, {"ff_context.net.0.proj": 4}),
    block("blocks.0.norm1_a.linear", _T0, {"norm1.linear": 6}),
    block("blocks.0.norm1_b.linear", _T0, {"norm1_context.linear": 6}),
    block("single_blocks.0.to_qkv_mlp", _S0, {**_attention("attn", QKV), "proj_mlp": 4}),
    block("single_blocks.1.proj_out", _S1, {"proj_out": 1}, inputs=5),
    block("single_blocks.1.norm.linear", _S1, {"norm.linear": 3}),
    Layer("final_norm_out.linear", {"norm_out.linear": 2 * D}, D),
]


def _unfused(layers: Sequence[Layer]) -> list[Layer]:
    """Return the same layers under the names of diffusers, fused ones split."""
    return [
        Layer(part, {part: rows}, layer.inputs)
        for layer in layers
        for part, rows in layer.parts.items()
    ]


def _processor(name: str) -> str:
    return name.replace(".attn.", ".attn.processor.").removesuffix(".0") + "_lora"


def _processors(layers: Sequence[Layer]) -> list[Layer]:
    """Return those of attention, named as diffusers did before 0.22."""
    return [
        layer._replace(name=_processor(layer.name))
        for layer in _unfused(layers)
        if ".attn." in layer.name
    ]


NAMES: dict[str, tuple[str, list[Layer]]] = {
    "bfl": ("flux", BFL),
    "diffsynth": ("flux", DIFFSYNTH),
    "diffusers_flux": ("flux", _unfused(BFL)),
    "native_sd3": ("sd3", SD3),
    "diffusers_sd3": ("sd3", _unfused(SD3)),
    "xlabs": ("flux", XLABS),
    "processors_flux": ("flux", _processors(BFL)),
    "processors_sd3": ("sd3", _processors(SD3)),
}
"""Dialect -> its family and layers."""


def base_of(family: str) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of every layer that a dialect of a family names here."""
    layers = [layer for own, layers in NAMES.values() if own == family for layer in layers]
    return {part: (layer.inputs, n) for layer in layers for part, n in layer.parts.items()}
