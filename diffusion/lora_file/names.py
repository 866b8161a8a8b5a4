"""Names of layers in the dialects of adapter files, as tables to the names of diffusers."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion.lora_file.family import FLUX, SD3, index_of, template_of


class Row(NamedTuple):
    """What a layer of a dialect is in diffusers.

    Attributes:
        parts: Templates of diffusers names; the rows of a fused layer belong to one after another.
        swapped: Whether the halves of the output are in the opposite order: ``always``, ``never``,
            or ``last``: where the output is two widths wide, in the last block.
    """

    parts: tuple[str, ...]
    swapped: str = "never"


class Match(NamedTuple):
    """A layer of a file and what it is in diffusers.

    Attributes:
        dialect: Name of the table.
        parts: diffusers names.
        swapped: See `Row`.
        underscored: Whether underscores replace the dots of the name.
    """

    dialect: str
    parts: tuple[str, ...]
    swapped: str
    underscored: bool


class NameTable:
    """The names of one dialect, with dots or with underscores in place of the dots.

    Args:
        name: Of the dialect.
        family: Of the models.
        rows: Template of a name in the dialect to its parts.
    """

    def __init__(self, name: str, family: str, rows: Mapping[str, Row]) -> None:
        self.name, self.family = name, family
        self.rows = dict(rows)
        self._underscored = {template.replace(".", "_"): row for template, row in rows.items()}

    def find(self, stem: str) -> Match | None:
        """Look up the diffusers name of a kohya layer name; None if it is unknown."""
        template = template_of(stem)
        row = self.rows.get(template) or self.rows.get(stem)
        underscored = row is None
        row = row or self._underscored.get(template) or self._underscored.get(stem)
        if row is None:
            return None
        index = index_of(stem)
        parts = tuple(part.replace("{i}", str(index)) for part in row.parts)
        return Match(self.name, parts, row.swapped, underscored)

    def inverse(self) -> dict[tuple[str, ...], tuple[str, str]]:
        """Return the parts of each row, to its name in the dialect and whether it is swapped."""
        return {row.parts: (name, row.swapped) for name, row in self.rows.items()}


TRANSFORMER = "transformer"


class Prefix(NamedTuple):
    """The start of the names of a network.

    Attributes:
        text: Such as ``lora_unet_``.
        component: ``transformer``, or a text encoder by its role: ``clip_l``, ``clip_g``, ``t5``,
            ``first``, ``second``, ``third``.
    """

    text: str
    component: str


_TRANSFORMER = (
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "pipe.dit.",
    "dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
_TEXT = {
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5",
    "text_encoders.clip_l.": "clip_l",
    "text_encoders.clip_g.": "clip_g",
    "text_encoders.t5xxl.": "t5",
    "text_encoder_3.": "third",
    "text_encoder_2.": "second",
    "text_encoder.": "first",
    "lora_te3_": "t5",
    "lora_te2_": "second",
    "lora_te1_": "first",
    "lora_te_": "first",
    "base_model.model.": "first",
}

PREFIXES = (
    *(Prefix(text, component) for text, component in _TEXT.items()),
    *(Prefix(text, TRANSFORMER) for text in _TRANSFORMER),
)  # all prefixes; a name may start with several, and the layer that follows decides

_ENCODERS = {
    "flux": {"first": 1, "clip_l": 1, "second": 2, "t5": 2, "third": 2},
    "sd3": {"first": 1, "clip_l": 1, "second": 2, "clip_g": 2, "third": 3, "t5": 3},
}


def encoder_name(family: str, component: str) -> str:
    """Return the diffusers name of a text encoder, such as ``text_encoder_2``."""
    number = _ENCODERS.get(family, _ENCODERS["sd3"]).get(component, 2)
    return "text_encoder" if number == 1 else f"text_encoder_{number}"


DIFFUSERS_FLUX = NameTable("diffusers", "flux", {name: Row((name,)) for name in FLUX.layers})
DIFFUSERS_SD3 = NameTable("diffusers", "sd3", {name: Row((name,)) for name in SD3.layers})


_DOUBLE, _SINGLE, _TIME_TEXT = (
    "transformer_blocks.{i}.",
    "single_transformer_blocks.{i}.",
    "time_text_embed.",
)


def _double(*layers: str, swapped: str = "never") -> Row:
    return Row(tuple(_DOUBLE + layer for layer in layers), swapped)


def _single(*layers: str) -> Row:
    return Row(tuple(_SINGLE + layer for layer in layers))


BFL_FLUX = NameTable(
    "bfl",
    "flux",
    {
        "double_blocks.{i}.img_attn.qkv": _double("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.{i}.txt_attn.qkv": _double(
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
        ),
        "double_blocks.{i}.img_attn.proj": _double("attn.to_out.0"),
        "double_blocks.{i}.txt_attn.proj": _double("attn.to_add_out"),
        "double_blocks.{i}.img_mlp.0": _double("ff.net.0.proj"),
        "double_blocks.{i}.img_mlp.2": _double("ff.net.2"),
        "double_blocks.{i}.txt_mlp.0": _double("ff_context.net.0.proj"),
        "double_blocks.{i}.txt_mlp.2": _double("ff_context.net.2"),
        "double_blocks.{i}.img_mod.lin": _double("norm1.linear"),
        "double_blocks.{i}.txt_mod.lin": _double("norm1_context.linear"),
        "single_blocks.{i}.linear1": _single("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single_blocks.{i}.linear2": _single("proj_out"),
        "single_blocks.{i}.modulation.lin": _single("norm.linear"),
        "img_in": Row(("x_embedder",)),
        "txt_in": Row(("context_embedder",)),
        "time_in.in_layer": Row((_TIME_TEXT + "timestep_embedder.linear_1",)),
        "time_in.out_layer": Row((_TIME_TEXT + "timestep_embedder.linear_2",)),
        "vector_in.in_layer": Row((_TIME_TEXT + "text_embedder.linear_1",)),
        "vector_in.out_layer": Row((_TIME_TEXT + "text_embedder.linear_2",)),
        "guidance_in.in_layer": Row((_TIME_TEXT + "guidance_embedder.linear_1",)),
        "guidance_in.out_layer": Row((_TIME_TEXT + "guidance_embedder.linear_2",)),
        "final_layer.linear": Row(("proj_out",)),
        "final_layer.adaLN_modulation.1": Row(("norm_out.linear",), "always"),
    },
)


DIFFSYNTH_FLUX = NameTable(
    "diffsynth",
    "flux",
    {layer.name: Row(layer.parts) for layer in FLUX.fused}
    | {
        "time_embedder.timestep_embedder.0": Row((_TIME_TEXT + "timestep_embedder.linear_1",)),
        "time_embedder.timestep_embedder.2": Row((_TIME_TEXT + "timestep_embedder.linear_2",)),
        "guidance_embedder.timestep_embedder.0": Row((_TIME_TEXT + "guidance_embedder.linear_1",)),
        "guidance_embedder.timestep_embedder.2": Row((_TIME_TEXT + "guidance_embedder.linear_2",)),
        "pooled_text_embedder.0": Row((_TIME_TEXT + "text_embedder.linear_1",)),
        "pooled_text_embedder.2": Row((_TIME_TEXT + "text_embedder.linear_2",)),
        "final_norm_out.linear": Row(("norm_out.linear",)),
        "final_proj_out": Row(("proj_out",)),
    },
)


XLABS_FLUX = NameTable(
    "xlabs",
    "flux",
    {
        "double_blocks.{i}.processor.qkv_lora1": _double("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.{i}.processor.qkv_lora2": _double(
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
        ),
        "double_blocks.{i}.processor.proj_lora1": _double("attn.to_out.0"),
        "double_blocks.{i}.processor.proj_lora2": _double("attn.to_add_out"),
        "single_blocks.{i}.processor.qkv_lora": _single("attn.to_q", "attn.to_k", "attn.to_v"),
        "single_blocks.{i}.processor.proj_lora": _single("proj_out"),
    },
)


NATIVE_SD3 = NameTable(
    "sd3",
    "sd3",
    {
        "joint_blocks.{i}.x_block.attn.qkv": _double("attn.to_q", "attn.to_k", "attn.to_v"),
        "joint_blocks.{i}.x_block.attn.proj": _double("attn.to_out.0"),
        "joint_blocks.{i}.x_block.attn2.qkv": _double("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "joint_blocks.{i}.x_block.attn2.proj": _double("attn2.to_out.0"),
        "joint_blocks.{i}.x_block.mlp.fc1": _double("ff.net.0.proj"),
        "joint_blocks.{i}.x_block.mlp.fc2": _double("ff.net.2"),
        "joint_blocks.{i}.x_block.adaLN_modulation.1": _double("norm1.linear"),
        "joint_blocks.{i}.context_block.attn.qkv": _double(
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
        ),
        "joint_blocks.{i}.context_block.attn.proj": _double("attn.to_add_out"),
        "joint_blocks.{i}.context_block.mlp.fc1": _double("ff_context.net.0.proj"),
        "joint_blocks.{i}.context_block.mlp.fc2": _double("ff_context.net.2"),
        "joint_blocks.{i}.context_block.adaLN_modulation.1": _double(
            "norm1_context.linear", swapped="last"
        ),
        "context_embedder": Row(("context_embedder",)),
        "t_embedder.mlp.0": Row((_TIME_TEXT + "timestep_embedder.linear_1",)),
        "t_embedder.mlp.2": Row((_TIME_TEXT + "timestep_embedder.linear_2",)),
        "y_embedder.mlp.0": Row((_TIME_TEXT + "text_embedder.linear_1",)),
        "y_embedder.mlp.2": Row((_TIME_TEXT + "text_embedder.linear_2",)),
        "final_layer.linear": Row(("proj_out",)),
        "final_layer.adaLN_modulation.1": Row(("norm_out.linear",), "always"),
    },
)


def _rows(layers: Iterable[str], attention: str = r"\.attn\.") -> dict[str, Row]:
    """Return the rows of layers of attentions, whose names match a pattern."""
    pattern = re.compile(rf"({attention})(\w+)(?:\.0)?$")
    named = {pattern.sub(r"\1processor.\2_lora", name): Row((name,)) for name in layers}
    return {theirs: row for theirs, row in named.items() if theirs not in row.parts}


PROCESSORS_FLUX = NameTable("attention processors", "flux", _rows(FLUX.layers))
PROCESSORS_SD3 = NameTable("attention processors", "sd3", _rows(SD3.layers))


UNETS = ("sd1", "sd2", "sdxl", "unet")
"""Families whose model is a U-Net of Stable Diffusion; the last is one of the others."""


def _unet_layers() -> dict[str, str]:
    """Return the layers of the U-Nets in diffusers, each with its name in their own checkpoints."""
    convolutions = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    attended = [f"attn{n}.to_{one}" for n in (1, 2) for one in ("q", "k", "v", "out.0")]
    inner = [f"transformer_blocks.{n}.{one}" for n in range(10)
             for one in (*attended, "ff.net.0.proj", "ff.net.2")]  # fmt: skip
    layers = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    places = [("mid_block", 0, "middle_block.0", "middle_block.1"),
              ("mid_block", 1, "middle_block.2", "")]  # fmt: skip
    for i in range(4):
        pairs = [(f"down_blocks.{i}", j, f"input_blocks.{3 * i + j + 1}") for j in range(2)]
        pairs += [(f"up_blocks.{i}", j, f"output_blocks.{3 * i + j}") for j in range(3)]
        places += [(block, j, f"{theirs}.0", f"{theirs}.1") for block, j, theirs in pairs]
        layers[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        layers[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{3 * i + 2}.2.conv"
    for block, j, residual, attention in places:
        start = f"{block}.resnets.{j}."
        layers |= {start + ours: f"{residual}.{theirs}" for ours, theirs in convolutions.items()}
        for name in ("proj_in", "proj_out", *inner) if attention else ():
            layers[f"{block}.attentions.{j}.{name}"] = f"{attention}.{name}"
    return layers


_UNET_LAYERS = _unet_layers()
UNET_TABLES = (
    NameTable("diffusers", "unet", {name: Row((name,)) for name in _UNET_LAYERS}),
    NameTable("ldm", "unet", {theirs: Row((name,)) for name, theirs in _UNET_LAYERS.items()}),
    NameTable("attention processors", "unet", _rows(_UNET_LAYERS, r"\.attn\d\.")),
)
OWN = "own"
"""Dialect of layers that no table names."""


_CLIP = "text_model.encoder.layers.{i}."
_T5 = "encoder.block.{i}.layer."
_ATTENTION = {
    "self_attn.to_q_lora": "self_attn.q_proj",
    "self_attn.to_k_lora": "self_attn.k_proj",
    "self_attn.to_v_lora": "self_attn.v_proj",
    "self_attn.to_out_lora": "self_attn.out_proj",
}
_LAYERS = (
    *(_CLIP + name for name in (*_ATTENTION.values(), "mlp.fc1", "mlp.fc2")),
    *(f"{_T5}0.SelfAttention.{name}" for name in "qkvo"),
    *(f"{_T5}1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wi", "wo")),
    "text_projection",
)

TEXT_ENCODERS = NameTable(
    "transformers",
    "",
    {name: Row((name,)) for name in _LAYERS}
    | {_CLIP + old: Row((_CLIP + new,)) for old, new in _ATTENTION.items()},
)  # adapters of text encoders, old attention processors included


TABLES = (
    DIFFUSERS_FLUX,
    BFL_FLUX,
    XLABS_FLUX,
    PROCESSORS_FLUX,
    DIFFSYNTH_FLUX,
    DIFFUSERS_SD3,
    NATIVE_SD3,
    PROCESSORS_SD3,
)  # tables of the layers of transformers
