"""The sizes of FLUX.1-dev without memory for it: published gates and encoders load strictly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from diffusion.evaluation.parity.worst import Check
from diffusion.fusion import GatedFusion
from diffusion.models.tiny_flux import UNIT
from diffusion.retrieval import EncoderConfig, LoraWeightEncoder

DEV: dict[str, Any] = UNIT | {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
"""Arguments of ``FluxTransformer2DModel`` for FLUX.1-dev."""

WIDTH, DOUBLE, SINGLE = 3072, 19, 38
STREAMS = {"a": "attn.a_to_qkv attn.a_to_out ff_a.0 ff_a.2 norm1_a.linear"}
STREAMS["b"] = STREAMS["a"].replace("a_", "b_").replace("_a", "_b")
DOUBLE_SIZES = ((1, 3), (1, 1), (1, 4), (4, 1), (1, 6))
"""Inputs and outputs of the layers of a stream in widths."""

SINGLE_SIZES = {"to_qkv_mlp": (1, 7), "proj_out": (5, 1), "norm.linear": (1, 3)}
TERMS = ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias")
NORMS = ("norm_base.weight", "norm_base.bias", "norm_lora.weight", "norm_lora.bias")
EMBED, HEAD_FEATURES, HIDDEN, LAYERS = 768, 768, 3072, 2
"""Of the published encoder."""


def published_layers() -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the fused layers of FLUX.1-dev, by their published names."""
    found = {}
    for block, stream in itertools.product(range(DOUBLE), STREAMS.values()):
        for name, (inputs, outputs) in zip(stream.split(), DOUBLE_SIZES, strict=True):
            found[f"blocks.{block}.{name}"] = (inputs * WIDTH, outputs * WIDTH)
    for block in range(SINGLE):
        for name, (inputs, outputs) in SINGLE_SIZES.items():
            found[f"single_blocks.{block}.{name}"] = (inputs * WIDTH, outputs * WIDTH)
    return found


def published_gates() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a published file of gates."""
    for name, (_, outputs) in published_layers().items():
        for parameter in (*TERMS, *NORMS):
            yield f"model_dict.{name.replace('.', '___')}.{parameter}", (outputs,)


def published_encoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the published encoder."""
    layers = published_layers()
    projections = {}
    for name, (inputs, outputs) in layers.items():
        yield f"embedder.model_dict.{name.replace('.', '___')}.x", (1, 1, inputs)
        kind = name.split(".", 2)[2].replace(".", "___")
        projections[kind] = outputs
    for kind, outputs in projections.items():
        yield f"embedder.proj_dict.{kind}.weight", (EMBED, outputs)
        yield f"embedder.proj_dict.{kind}.bias", (EMBED,)
    yield "position_embeds", (1, len(layers), EMBED)
    sizes = {"fc1": (HIDDEN, EMBED), "fc2": (EMBED, HIDDEN)}
    sizes |= {f"attn.to_{x}": (HEAD_FEATURES, EMBED) for x in ("q", "k", "v")}
    sizes["attn.to_out"] = (EMBED, HEAD_FEATURES)
    for layer in range(LAYERS):
        for name, (outputs, inputs) in sizes.items():
            yield f"encoders.{layer}.{name}.weight", (outputs, inputs)
            yield f"encoders.{layer}.{name}.bias", (outputs,)
        for norm, part in itertools.product(("layer_norm1", "layer_norm2"), ("weight", "bias")):
            yield f"encoders.{layer}.{norm}.{part}", (EMBED,)
    for part in ("weight", "bias"):
        yield f"final_layer_norm.{part}", (EMBED,)


def mismatches(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many parameters are missing, too many or of another shape."""
    same = [n for n in found.keys() & expected.keys() if tuple(found[n].shape) == expected[n]]
    return len(found.keys() | expected.keys()) - len(same)


def check_published(folder: str | Path) -> dict[str, Check]:
    """Load published gates and encoders of FLUX.1-dev strictly, the models without memory."""
    del folder
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(**DEV)
        encoder = LoraWeightEncoder(EncoderConfig.published())
    shapes = dict(published_gates())
    with TemporaryDirectory() as place:
        path = Path(place) / "gates.safetensors"
        save_file({name: torch.zeros(s, dtype=torch.bfloat16) for name, s in shapes.items()}, path)
        fusion = GatedFusion(model, {}, everywhere=True, gates=path)
    gates = {f"model_{name.replace('gates.', 'dict.')}": p for name, p in _named_gates(fusion)}
    wrong = mismatches(gates, shapes)
    shapes = dict(published_encoder())
    found = dict(encoder.named_parameters())
    wrong += mismatches(found, shapes)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    encoder.load_state_dict(state, strict=True, assign=True)
    wrong += sum(not p.is_meta for p in [*model.parameters(), *encoder.parameters()])
    return {
        "fused modules of FLUX.1-dev": Check(float(len(fusion.gates))),
        "millions of parameters of gates": Check(_millions(gates)),
        "millions of parameters of the encoder": Check(_millions(found)),
        "parameters of published files that do not fit": Check(float(wrong), len(gates)),
    }


def _named_gates(fusion: GatedFusion) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in fusion.named_parameters() if name.startswith("gates."))


def _millions(parameters: Mapping[str, Tensor]) -> float:
    return round(sum(p.numel() for p in parameters.values()) / 1e6, 1)
