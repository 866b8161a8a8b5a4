"""The gate in its four variants, with gradients, and the gated layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from core_gates.adapters import GatedLoraLinear, LoraGate, LowRank
from core_gates.ops.gated_lora.op import gated_lora
from diffusion.evaluation.parity.golden.vectors import read_vectors
from diffusion.evaluation.parity.worst import Check, relative_error, worst

VARIANTS = ("full", "no_base", "no_cross", "no_lora")


def loaded_gate(arrays: dict[str, Tensor], prefix: str, dim: int, **options: str) -> LoraGate:
    """Return a gate with the parameters of vectors."""
    gate = LoraGate(dim, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            parameter.copy_(arrays[f"{prefix}.{name}"])
    return gate


def gate_errors(arrays: dict[str, Tensor], variant: str) -> Iterator[tuple[str, float]]:
    """Yield the errors of a variant, of whole outputs and by the op that never forms them.

    An adapter of one-hot hidden activations has any given outputs: the rows of its factor B.
    """
    base, loras = (arrays[name].clone().requires_grad_() for name in ("base", "loras"))
    gate = loaded_gate(arrays, f"{variant}.w", base.shape[-1], variant=variant)
    number, tokens = len(loras), base.shape[:-1].numel()
    hidden = torch.eye(tokens, dtype=torch.float64).repeat(1, number)
    hidden = hidden.view(*base.shape[:-1], -1)
    ranks = [tokens] * number
    for how in ("whole", "streamed"):
        if how == "whole":
            out = gate(base, loras.movedim(0, -2))
        else:
            out = gated_lora(base, hidden, loras.flatten(0, 2), gate.coefficients(), ranks)
        yield f"{variant} {how}: out", relative_error(out, arrays[f"{variant}.out"])
        parameters = dict(gate.named_parameters())
        wanted = [base, loras, *parameters.values()]
        found = torch.autograd.grad(out, wanted, arrays["cotangent"])
        keys = ["dbase", "dloras", *(f"g.{name}" for name in parameters)]
        for key, gradient in zip(keys, found, strict=True):
            yield f"{variant} {how}: {key}", relative_error(gradient, arrays[f"{variant}.{key}"])


def gated_layer(arrays: dict[str, Tensor], chosen: Sequence[int], *, gated: bool) -> nn.Module:
    """Return the layer of ``gated_linear_a.npz`` with some of its adapters."""
    outputs, inputs = arrays["W"].shape
    linear = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(arrays["W"])
    linear.bias.copy_(arrays["b"])
    factors = [
        LowRank(arrays[f"A{k}"], arrays[f"B{k}"], float(arrays["alphas"][k])) for k in chosen
    ]
    gate = LoraGate(outputs, dtype=torch.float64)
    return GatedLoraLinear(
        linear, factors, gate=loaded_gate(arrays, "gate", outputs) if gated else gate
    )


def check_gates(folder: str | Path) -> dict[str, Check]:
    """Compare with ``gate_a.npz``, ``gate_b.npz`` and ``gated_linear_a.npz``."""
    errors: dict[str, float] = {}
    for file in ("gate_a", "gate_b"):
        arrays = read_vectors(folder, f"{file}.npz").arrays
        for variant in VARIANTS:
            errors |= {f"{file} {name}": error for name, error in gate_errors(arrays, variant)}
    arrays = read_vectors(folder, "gated_linear_a.npz").arrays
    count = len(arrays["alphas"])
    cases = {
        "naive": (range(count), False),
        "gated": (range(count), True),
        "gated_missing": ([0, count - 1], True),
    }
    layers = {
        name: relative_error(gated_layer(arrays, chosen, gated=gated)(arrays["x"]), arrays[name])
        for name, (chosen, gated) in cases.items()
    }
    return {
        "gate: four variants with gradients": worst(errors.items()),
        "gated layer, also without some adapters": worst(layers.items()),
    }
