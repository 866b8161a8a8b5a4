"""The embedded FLUX with gated adapters, against PEFT with the same adapters."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.comparison import Call, Comparison, Load
from benchmarks.diffusion import block
from diffusion.lora_file import Factors, LoraBundle

BATCH, TEXTS, RANK, SHAPE = 32, 12, 4, "tiny"
BARS = {3: 1.10, 8: 1.00}


def comparisons() -> Iterator[Comparison]:
    """Three and eight adapters; on one CPU thread."""
    return map(tiny_flux, (3, 8))


def tiny_flux(num_adapters: int) -> Comparison:
    """Compare a forward pass with K gated adapters with PEFT, and with none."""

    def build(load: Load) -> Mapping[str, Call]:
        return _variants(load, num_adapters)

    return Comparison(
        name=f"tiny FLUX, batch {BATCH}, rank {RANK}, K={num_adapters}",
        op="gated_flux",
        build=build,
        baseline="peft",
        bars={"cpp": BARS[num_adapters]},
        also={"cpp": "none"},
        absent={} if block.is_installed() else {"peft": block.ABSENT},
    )


def _variants(load: Load, num_adapters: int) -> Mapping[str, Call]:
    torch.manual_seed(0)
    plain = (
        load("diffusion.models.embedded_base").transformer_of(SHAPE).eval().requires_grad_(False)
    )
    text = load("diffusion.models.text_encoders").TextStates(
        torch.randn(BATCH, TEXTS, plain.config.joint_attention_dim),
        torch.randn(BATCH, plain.config.pooled_projection_dim),
    )
    given = torch.randn(BATCH, 16, 8, 8), torch.rand(BATCH), text
    adapters = _adapters(plain, num_adapters)
    kernels = load("core_gates.ops").kernels
    velocity = load("diffusion.models.flow_matching").velocity
    gated = deepcopy(plain)
    fusion = load("diffusion.fusion").GatedFusion(gated, adapters)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    fusion.attach()

    def variant(model: nn.Module, mode: str) -> Call:
        def call() -> object:
            with kernels(mode), torch.no_grad():
                return velocity(model, *given)

        call.holds = fusion  # type: ignore[attr-defined]
        return call

    calls = {"none": variant(plain, "reference"), "cpp": variant(gated, "cpp")}
    if block.is_installed():
        calls["peft"] = variant(block.with_peft(deepcopy(plain), adapters), "reference")
    return calls


def _adapters(model: Any, number: int) -> dict[str, LoraBundle]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n}
    return {
        f"a{k}": LoraBundle(
            "flux",
            {
                name: Factors(
                    0.1 * torch.randn(RANK, layer.in_features),
                    0.1 * torch.randn(layer.out_features, RANK),
                )
                for name, layer in layers.items()
            },
        )
        for k in range(number)
    }
