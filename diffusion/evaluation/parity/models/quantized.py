"""Neutral gates on a base of few bits: that base plus the adapters, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.evaluation.parity.models.subjects import (
    merged_into,
    predicted,
    random_adapter,
    unit_base,
    unit_inputs,
)
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.fusion import GatedFusion
from diffusion.fusion.sites import linear_sizes
from diffusion.models.loading import read_gguf

KINDS = ("gguf", "int8", "float8")


class EightBits(nn.Linear):
    """A layer whose weight is stored in eight bits, with a scale per row."""

    scale: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """Return a layer with the rounded weight of another."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        made.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), False)
        made.bias = layer.bias
        made.register_buffer("scale", scale)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def in_eight_bits(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model, in place."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, EightBits.of(layer))
    return model


def write_gguf(model: nn.Module, path: Path) -> Path:
    """Write a GGUF file, matrices in Q8_0 where their rows allow it."""
    import gguf

    eight = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, eight), raw_dtype=eight)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def quantized(kind: str, model: Any, folder: Path) -> tuple[Any, Any]:
    """Return a model in few bits, and one in float32 of the same weights.

    Args:
        kind: One of :data:`KINDS`.
        model: In float32; it stays as it is.
        folder: For files.
    """
    made = deepcopy(model)
    if kind == "int8":
        in_eight_bits(made)
    elif kind == "gguf":
        model.save_config(folder)
        made = read_gguf(write_gguf(model, folder / "m.gguf"), folder, torch.float32)
    else:
        made.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
    exact = deepcopy(model)
    for name in linear_sizes(model):
        layer, target = made.get_submodule(name), exact.get_submodule(name)
        eye = torch.eye(layer.in_features)
        bias = layer(torch.zeros(1, layer.in_features))
        target.weight.copy_((layer(eye) - bias).T)
        if target.bias is not None:
            target.bias.copy_(bias[0])
    return made.requires_grad_(False), exact


def side_path_errors(kind: str, folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the errors of a neutral fusion on a base of few bits, and what is left of it."""
    model, inputs = unit_base(), unit_inputs()
    base, exact = quantized(kind, model, folder)
    adapters = {"a": random_adapter(model, 1), "b": random_adapter(model, 2, rank=3)}
    before = predicted(base, inputs)
    yield f"{kind}: alone", relative_error(before, predicted(exact, inputs))
    same = torch.equal(before, predicted(model, inputs))
    yield f"{kind}: other than in float32", float("inf") if same else 0.0
    expected = predicted(merged_into(exact, adapters), inputs)
    for mode in ("gated", "sum"):
        with GatedFusion(base, adapters, mode=mode):  # type: ignore[arg-type]
            yield f"{kind}: {mode}", relative_error(predicted(base, inputs), expected)
        left = torch.equal(predicted(base, inputs), before)
        yield f"{kind}: after {mode}", 0.0 if left else float("inf")


def check_quantized(folder: str | Path) -> dict[str, Check]:
    """Compare neutral gates on GGUF Q8_0, int8 and float8-cast bases."""
    del folder
    errors: list[tuple[str, float]] = []
    for kind in KINDS:
        with TemporaryDirectory() as place:
            errors += side_path_errors(kind, Path(place))
    return {"neutral gates on GGUF Q8_0, int8 and float8 bases": worst(errors)}
