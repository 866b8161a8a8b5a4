"""Families of models: names and sizes of their linear layers, derived from a few numbers.

FLUX.1 (Black Forest Labs, 2024), Stable Diffusion 3 and 3.5 (Esser et al., 2024).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Widths = int | tuple[int, ...] | None
"""A size as multiple of the width d, as one of several multiples, or free (an embedder's input)."""

_INDEX = re.compile(r"((?:blocks|layers|block)[._])(0|[1-9]\d{0,3})(?=[._])")


class FusedLayer(NamedTuple):
    """A linear layer as published checkpoints fuse it: the outputs of its parts, one after another.

    Attributes:
        name: Template of its name, as the published encoder orders it.
        type: Layers of one type share a projection in the encoder.
        parts: Templates of the diffusers names whose rows it holds.
    """

    name: str
    type: str
    parts: tuple[str, ...]


class Placed(NamedTuple):
    """A fused layer of a model of known size.

    Attributes:
        name: Such as ``blocks.0.attn.a_to_qkv``.
        type: Such as ``attn.a_to_qkv``.
        parts: diffusers names of its parts.
        in_features: Inputs.
        sizes: Outputs of each part.
    """

    name: str
    type: str
    parts: tuple[str, ...]
    in_features: int
    sizes: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Outputs of the fused layer."""
        return sum(self.sizes)


class Family(NamedTuple):
    """What the models of a family have in common.

    Attributes:
        name: Such as ``flux``.
        layers: Template of a diffusers name to inputs and outputs.
        fused: What published checkpoints fuse; all other layers are alone.
    """

    name: str
    layers: Mapping[str, tuple[Widths, Widths]]
    fused: tuple[FusedLayer, ...]

    def width(self, shapes: Mapping[str, tuple[int, int]]) -> int | None:
        """Infer the width of the model that most of the given layers agree on.

        Args:
            shapes: diffusers name to inputs and outputs.
        """
        votes: Counter[int] = Counter()
        for name, sizes in shapes.items():
            for size, factor in zip(sizes, self.layers.get(template_of(name), ()), strict=False):
                if isinstance(factor, int) and size % factor == 0:
                    votes[size // factor] += 1
        return min(votes, key=lambda width: (-votes[width], width)) if votes else None

    def out_features(self, name: str, width: int) -> int | None:
        """Return the outputs of a layer in a model of a width; None if the name does not decide."""
        factor = self.layers[template_of(name)][1]
        return factor * width if isinstance(factor, int) else None

    def misfits(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Return the expected shape, as text, of each layer that contradicts the others.

        Args:
            shapes: diffusers name to inputs and outputs.
        """
        width = self.width(shapes)
        misfit: dict[str, str] = {}
        for name, sizes in shapes.items():
            factors = self.layers.get(template_of(name))
            if factors is None or width is None:
                continue
            wanted = [
                None
                if factor is None
                else [f * width for f in (factor if isinstance(factor, tuple) else (factor,))]
                for factor in factors
            ]
            if any(w is not None and size not in w for size, w in zip(sizes, wanted, strict=True)):
                texts = ("any" if w is None else " or ".join(map(str, w)) for w in wanted)
                misfit[name] = " → ".join(texts)
        return misfit


def template_of(name: str) -> str:
    """Return a name with ``{i}`` in place of its first block number."""
    return _INDEX.sub(r"\g<1>{i}", name, count=1)


def index_of(name: str) -> int | None:
    """Return the first block number of a name."""
    match = _INDEX.search(name)
    return int(match[2]) if match else None


def expand(layers: Iterable[str], list_name: str, count: int) -> list[str]:
    """Return the names of the layers of all blocks of a list, block by block."""
    inside = [name for name in layers if name.startswith(f"{list_name}.{{i}}.")]
    return [name.format(i=i) for i in range(count) for name in inside]


def fused_layers(
    layers: dict[str, tuple[str, ...]], ours: str, theirs: str
) -> tuple[FusedLayer, ...]:
    """Return the fused layers of a block of list ``theirs``, named as in list ``ours``."""
    return tuple(
        FusedLayer(f"{ours}.{{i}}.{kind}", kind, tuple(f"{theirs}.{{i}}.{part}" for part in parts))
        for kind, parts in layers.items()
    )


def resolve(
    family: Family, names: list[str], width: int, free: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) by layer, from the width of the model and the sizes in ``free``."""

    def size(name: str, factor: Widths) -> int:
        return factor * width if isinstance(factor, int) else free[name]

    factors = {name: family.layers[template_of(name)] for name in names}
    return {name: (size(name, i), size(name, o)) for name, (i, o) in factors.items()}


def place(
    family: Family, counts: dict[str, int], modules: dict[str, tuple[int, int]]
) -> list[Placed]:
    """Return the fused layers of a model, whose parts lie in ``modules``.

    Args:
        family: Gives the layers of one block.
        counts: Number of blocks, by the first part of the fused names.
        modules: diffusers name to inputs and outputs; parts that it lacks are left out.
    """
    placed = []
    for prefix, count in counts.items():
        fused = [layer for layer in family.fused if layer.name.startswith(f"{prefix}.")]
        for i in range(count):
            for layer in fused:
                parts = [part.format(i=i) for part in layer.parts]
                parts = [part for part in parts if part in modules]
                if parts:
                    sizes = tuple(modules[part][1] for part in parts)
                    name = layer.name.format(i=i)
                    inputs = modules[parts[0]][0]
                    placed.append(Placed(name, layer.type, tuple(parts), inputs, sizes))
    return placed


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
FLUX_OUTER: dict[str, tuple[Widths, Widths]] = {
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
}  # layers outside of the blocks

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
    | FLUX_OUTER,
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
        names = [name for name in FLUX_OUTER if self.guidance or "guidance" not in name]
        names += expand(FLUX.layers, DOUBLE, self.num_layers)
        names += expand(FLUX.layers, SINGLE, self.num_single_layers)
        return resolve(FLUX, names, self.width, free)

    def fused(self) -> list[Placed]:
        """Return the fused layers of all blocks, in the order of the published encoder."""
        counts = {"blocks": self.num_layers, "single_blocks": self.num_single_layers}
        return place(FLUX, counts, self.modules())


JOINT = "transformer_blocks"

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
SD3_OUTER: dict[str, tuple[Widths, Widths]] = {
    "context_embedder": (None, 1),
    "time_text_embed.timestep_embedder.linear_1": (None, 1),
    "time_text_embed.timestep_embedder.linear_2": (1, 1),
    "time_text_embed.text_embedder.linear_1": (None, 1),
    "time_text_embed.text_embedder.linear_2": (1, 1),
    "norm_out.linear": (1, 2),
    "proj_out": (1, None),
}  # linear layers outside of the blocks; the patch embedding is a convolution

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
    {f"{JOINT}.{{i}}.{name}": sizes for name, sizes in _LAYERS.items()} | SD3_OUTER,
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
        names = [
            name
            for name in expand(SD3.layers, JOINT, self.num_layers)
            if name not in lacking
            and (".attn2." not in name or int(name.split(".")[1]) in self.dual_attention)
        ]
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
        return resolve(SD3, [*SD3_OUTER, *names], self.width, free)

    def fused(self) -> list[Placed]:
        """Return the fused layers of all blocks, in order."""
        return place(SD3, {"blocks": self.num_layers}, self.modules())


FAMILIES = {family.name: family for family in (FLUX, SD3)}
