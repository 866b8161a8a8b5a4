"""A transformer block of FLUX.1 at full size with gated adapters, and with those of peft."""

import importlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.comparison import Call, Comparison, Load, Peaks
from benchmarks.core.gated_lora import ABSENT, is_installed
from diffusion.lora_file import Factors, LoraBundle


@torch.no_grad()
def with_peft(model: nn.Module, adapters: Mapping[str, LoraBundle]) -> nn.Module:
    """Return the model with all adapters active in its layers, which are changed in place.

    Args:
        model: Frozen; its linear layers are wrapped.
        adapters: Name -> adapter, of one rank and of the same layers.
    """
    peft: Any = importlib.import_module("peft")
    for name, bundle in adapters.items():
        rank = next(iter(bundle.ranks().values()))
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(bundle.modules))
        model = peft.inject_adapter_in_model(config, model, adapter_name=name)
        for layer, factors in bundle.modules.items():
            wrapped: Any = model.get_submodule(layer)
            wrapped.lora_A[name].weight.copy_(factors.down)
            wrapped.lora_B[name].weight.copy_(factors.scale * factors.up)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter(list(adapters))
    return model.eval().requires_grad_(False)


TOKENS, TEXTS, WIDTH, HEADS, RANK = 512, 128, 3072, 24, 16
BARS = {3: 1.10, 8: 1.20}
MOST_MEMORY = 0.1
"""Extra peak memory over one tensor of all outputs of all adapters, K · N · D."""


def comparisons() -> Iterator[Comparison]:
    """Three and eight adapters; on one CPU thread."""
    return map(block, (3, 8))


def block(num_adapters: int) -> Comparison:
    """Compare the block with K gated adapters with the plain one, and with PEFT.

    The row ``grouped`` is the same with published gates, which see the queries, keys, values and
    the first layer of the feed-forward network fused.
    """

    def build(load: Load) -> Mapping[str, Call]:
        return _variants(load, num_adapters)

    weights = 4.0 * 23 * WIDTH**2
    return Comparison(
        name=f"FLUX.1 single block, {TOKENS} tokens, rank {RANK}, K={num_adapters}",
        op="gated_block",
        build=build,
        baseline="plain",
        bars={"cpp": BARS[num_adapters]},
        absent={} if is_installed() else {"peft": ABSENT},
        memory=4 * weights,
        peaks=Peaks(
            {"cpp": MOST_MEMORY if num_adapters == 8 else None},
            4.0 * num_adapters * TOKENS * WIDTH,
            "K·N·D",
        ),
    )


def _variants(load: Load, num_adapters: int) -> Mapping[str, Call]:
    torch.manual_seed(0)
    plain, given = _block(), _inputs()
    adapters = _adapters(plain, num_adapters)
    fusion = load("diffusion.fusion").GatedFusion
    kernels = load("core_gates.ops").kernels
    apart, grouped = deepcopy(plain), FluxTransformer2DModel(deepcopy(plain))
    apart_fusion = fusion(apart, adapters)
    prefix = "single_transformer_blocks.0."
    within = {
        name: LoraBundle("flux", {prefix + layer: f for layer, f in bundle.modules.items()})
        for name, bundle in adapters.items()
    }
    grouped_fusion = fusion(grouped, within)
    for one in (apart_fusion, grouped_fusion):
        _draw(one)
        one.attach()

    def variant(module: nn.Module, mode: str) -> Call:
        def call() -> object:
            with kernels(mode), torch.no_grad():
                return module(**given)

        call.holds = (apart_fusion, grouped_fusion)  # type: ignore[attr-defined]
        return call

    calls = {
        "plain": variant(plain, "reference"),
        "cpp": variant(apart, "cpp"),
        "grouped": variant(grouped.single_transformer_blocks[0], "cpp"),
    }
    if is_installed():
        calls["peft"] = variant(with_peft(deepcopy(plain), adapters), "reference")
    return calls


class FluxTransformer2DModel(nn.Module):
    """One block at the place where the family of its model is known.

    Args:
        block: A single-stream block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList([block])


def _block() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    found: nn.Module = FluxSingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    return found.eval().requires_grad_(False)


def _inputs() -> dict[str, Any]:
    angles = torch.rand(TOKENS, WIDTH // HEADS)
    return {
        "hidden_states": torch.randn(1, TOKENS - TEXTS, WIDTH),
        "encoder_hidden_states": torch.randn(1, TEXTS, WIDTH),
        "temb": torch.randn(1, WIDTH),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _adapters(module: nn.Module, number: int) -> dict[str, LoraBundle]:
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {
        f"a{k}": LoraBundle(
            "flux",
            {
                name: Factors(
                    torch.randn(RANK, layer.in_features) / layer.in_features**0.5,
                    torch.randn(layer.out_features, RANK) / RANK**0.5,
                    0.1,
                )
                for name, layer in linears.items()
            },
        )
        for k in range(number)
    }


@torch.no_grad()
def _draw(fusion: nn.Module) -> None:
    """Draw the parameters of gates, which are then no plain sum."""
    for parameter in fusion.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
