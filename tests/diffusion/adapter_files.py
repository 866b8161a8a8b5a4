"""Adapter files in any dialect with their exact ΔW, from the definitions of the formats alone.

Nothing here comes from the package that reads such files.
"""

import itertools
import zlib
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

D = 16  # width of the models; two blocks of each kind
PREFIXES = {  # whether a prefix replaces dots by underscores -> prefixes
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


class Layer(NamedTuple):
    """A layer by its name in a dialect, and the layers that it is in diffusers with their rows.

    ``swapped``: the two halves of its rows change places in diffusers.
    """

    name: str
    parts: dict[str, int]
    inputs: int
    swapped: bool = False


def block(native, own, theirs, *, inputs=1, swapped=False):
    """A layer of block 0 or 1; ``theirs`` maps parts to rows in widths, as ``inputs``."""
    parts = {f"{own}.{part}": rows * D for part, rows in theirs.items()}
    return Layer(native, parts, inputs * D, swapped)


def _attention(prefix, names):
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


def _unfused(layers):
    """The same layers under the names of diffusers, fused ones split."""
    return [
        Layer(part, {part: rows}, layer.inputs)
        for layer in layers
        for part, rows in layer.parts.items()
    ]


def _processors(layers):
    """Those of attention, named as diffusers did before 0.22."""
    return [
        one._replace(
            name=one.name.replace(".attn.", ".attn.processor.").removesuffix(".0") + "_lora"
        )
        for one in _unfused(layers)
        if ".attn." in one.name
    ]


NAMES = {  # dialect -> its family and layers
    "bfl": ("flux", BFL),
    "diffsynth": ("flux", DIFFSYNTH),
    "diffusers_flux": ("flux", _unfused(BFL)),
    "native_sd3": ("sd3", SD3),
    "diffusers_sd3": ("sd3", _unfused(SD3)),
    "xlabs": ("flux", XLABS),
    "processors_flux": ("flux", _processors(BFL)),
    "processors_sd3": ("sd3", _processors(SD3)),
}


def base_of(family):
    """Inputs and outputs of every layer that a dialect of a family names here."""
    layers = [layer for own, layers in NAMES.values() if own == family for layer in layers]
    return {part: (layer.inputs, n) for layer in layers for part, n in layer.parts.items()}


PAIRS = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora_A bare": ("lora_A", "lora_B"),
    "lora_A adapter": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora_A adapter bare": ("lora_A.my-style", "lora_B.my-style"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "convolution": ("lora_down.weight", "lora_up.weight"),
    "tucker": ("lora_down.weight", "lora_up.weight"),
    "dora rows": ("lora_down.weight", "lora_up.weight"),
    "dora peft": ("lora_A.weight", "lora_B.weight"),
}
LOKR = tuple(f"lokr {a}{b}" for a, b in itertools.product("wf", "wft"))  # whole, factored, core
FACTORS = (*PAIRS, "loha", "loha tucker", *LOKR)
# Norms of columns belong to the whole layer, so they occur on layers of one part only.
PAIRS |= {"_lora": ("down.weight", "up.weight"), "dora columns": PAIRS["lora_down"]}


def kinds_of(names):
    """The kinds of factors that occur with the names of a dialect."""
    if names == "xlabs" or names.startswith("processors"):
        return ("_lora",)
    return FACTORS + (("dora columns",) if names.startswith("diffusers") else ())


def product():
    """Every dialect of names with every kind of factors and every prefix."""
    for names, (underscored, prefixes) in itertools.product(NAMES, PREFIXES.items()):
        for prefix, kind in itertools.product(prefixes, kinds_of(names)):
            if not (underscored and kind == "_lora"):
                yield names, kind, prefix


class Written(NamedTuple):
    """A file and what it means.

    Attributes:
        family: ``flux`` or ``sd3``.
        tensors: What is stored.
        expected: Layer in diffusers -> ΔW.
        base: Layer -> the weight of a base, which DoRA refers to.
    """

    family: str
    tensors: dict
    expected: dict
    base: dict

    def save(self, path, metadata=None):
        save_file(self.tensors, path, metadata)
        return path


class Writer:
    """Draws the tensors of one file; what is expected is computed from the rounded values."""

    def __init__(self, seed, dtype, alpha):
        self.rng = np.random.default_rng(seed)
        self.dtype, self.alpha = dtype, alpha
        self.tensors, self.expected, self.base = {}, {}, {}

    def layer(self, name, layer, kind):
        """Draw the change of a layer; ``name`` is that in the file, with its prefix."""
        outputs, rank = sum(layer.parts.values()), int(self.rng.integers(1, 4))
        method = self._loha if "loha" in kind else self._lokr if "lokr" in kind else self._pair
        change, divisor = method(name, kind, outputs, layer.inputs, rank)
        if self.alpha:
            value = float(self.rng.integers(1, 9)) / 2
            self.tensors[f"{name}.alpha"] = torch.tensor(value)
            change = change * (1 if divisor is None else value / divisor)
        weight = self.rng.normal(size=change.shape)
        if kind.startswith("dora"):
            change = self._dora(name, kind, weight, change)
        if layer.swapped:
            change, weight = (np.roll(m, len(m) // 2, axis=0) for m in (change, weight))
        start = 0
        for part, rows in layer.parts.items():
            self.expected[part] = change[start : start + rows]
            self.base[part] = torch.from_numpy(weight[start : start + rows].copy())
            start += rows

    def _put(self, name, shape, ones=()):
        """Draw a tensor, and return its rounded values."""
        stored = torch.from_numpy(self.rng.normal(size=shape)).to(self.dtype)
        self.tensors[name] = stored.reshape(*shape, *ones).clone()
        return stored.double().numpy()

    def _pair(self, name, kind, outputs, inputs, rank):
        down, up = PAIRS[kind]
        ones = (1, 1) if kind in ("convolution", "tucker") else ()
        a = self._put(f"{name}.{down}", (rank, inputs), ones)
        b = self._put(f"{name}.{up}", (outputs, rank), ones)
        if kind == "tucker":
            b = b @ self._put(f"{name}.lora_mid.weight", (rank, rank), (1, 1))
        return b @ a, rank

    def _loha(self, name, kind, outputs, inputs, rank):
        product = np.ones((outputs, inputs))
        for n in (1, 2):
            if kind == "loha":
                a = self._put(f"{name}.hada_w{n}_a", (outputs, rank))
            else:
                a = self._put(f"{name}.hada_w{n}_a", (rank, outputs)).T
                a = a @ self._put(f"{name}.hada_t{n}", (rank, rank), (1, 1))
            product *= a @ self._put(f"{name}.hada_w{n}_b", (rank, inputs))
        return product, rank

    def _lokr(self, name, kind, outputs, inputs, rank):
        sizes = ((2, 2), (outputs // 2, inputs // 2))
        halves, divisor, own = [], None, (rank + 1, rank)
        for n, form, (rows, columns), r in zip((1, 2), kind.split()[1], sizes, own, strict=True):
            if form == "w":
                halves.append(self._put(f"{name}.lokr_w{n}", (rows, columns)))
                continue
            divisor = r
            if form == "f":
                a = self._put(f"{name}.lokr_w{n}_a", (rows, r))
            else:
                a = self._put(f"{name}.lokr_w{n}_a", (r, rows)).T
                a = a @ self._put(f"{name}.lokr_t{n}", (r, r), (1, 1))
            halves.append(a @ self._put(f"{name}.lokr_w{n}_b", (r, columns)))
        return np.kron(*halves), divisor

    def _dora(self, name, kind, weight, change):
        axis = 0 if kind == "dora columns" else 1
        stored = torch.from_numpy(self.rng.uniform(1, 2, change.shape[1 - axis])).float()
        magnitude = stored.double().numpy().reshape((1, -1) if axis == 0 else (-1, 1))
        if kind == "dora peft":
            self.tensors[f"{name}.lora_magnitude_vector"] = stored
        else:
            self.tensors[f"{name}.dora_scale"] = stored.reshape(magnitude.shape)
        changed = weight + change
        return magnitude * changed / np.linalg.norm(changed, axis=axis, keepdims=True) - weight


def write(names, kind, prefix="", *, layers=None, dtype=torch.float32, alpha=True, seed=None):
    """Draw a file of one dialect.

    Args:
        names: Key of `NAMES`.
        kind: One of those that `kinds_of` returns for the names.
        prefix: One of `PREFIXES`; one that ends with an underscore replaces dots.
        layers: Number of layers that are drawn; all of them if None.
        dtype: That factors are stored in.
        alpha: Whether α is stored.
        seed: Of everything; by default it follows from the dialect.
    """
    seed = zlib.crc32(f"{names} {kind} {prefix}".encode()) if seed is None else seed
    writer = Writer(seed, dtype, alpha)
    family, chosen = NAMES[names]
    if layers is not None and layers < len(chosen):
        chosen = [chosen[i] for i in sorted(writer.rng.permutation(len(chosen))[:layers])]
    for layer in chosen:
        name = layer.name.replace(".", "_") if prefix.endswith("_") else layer.name
        writer.layer(prefix + name, layer, kind)
    return Written(family, writer.tensors, writer.expected, writer.base)
