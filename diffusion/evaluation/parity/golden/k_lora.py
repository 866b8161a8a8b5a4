"""Which adapter K-LoRA chooses at a layer call, and what it adds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.evaluation.parity.golden.vectors import read_vectors
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.lora_file import Factors, LoraBundle
from diffusion.rivals.k_lora import KLora


@torch.no_grad()
def plain_layer(weight: Tensor, bias: Tensor) -> nn.Sequential:
    """Return a model of one frozen layer."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, dtype=weight.dtype).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return nn.Sequential(layer)


def choice_errors(arrays: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield 1 for each wrong choice, and the errors of the outputs of choices."""
    total = int(arrays["klora.T"])
    model = plain_layer(arrays["W"], arrays["b"])
    adapters = {
        str(k): LoraBundle("flux", {"0": Factors(arrays[f"A{k}"], arrays[f"B{k}"])}) for k in (0, 1)
    }
    calls, choices = arrays["klora.t"].tolist(), arrays["klora.choice"].tolist()
    base = arrays["x"] @ arrays["W"].T + arrays["b"]
    with KLora(model, adapters, gamma=1.0) as rival:
        for call, choice in zip(calls, choices, strict=True):
            yield f"choice at {call}", float(rival.choice("0", call, total) != str(choice))
            rival.at(call, total)
            expected = base + arrays["x"] @ arrays[f"A{choice}"].T @ arrays[f"B{choice}"].T
            yield f"output at {call}", relative_error(model(arrays["x"]), expected)
        rival.at(calls[3], total)
        yield "klora.out", relative_error(model(arrays["x"]), arrays["klora.out"])


def check_k_lora(folder: str | Path) -> dict[str, Check]:
    """Compare with ``gated_linear_a.npz``."""
    arrays = read_vectors(folder, "gated_linear_a.npz").arrays
    return {"K-LoRA: choices": worst(choice_errors(arrays))}
