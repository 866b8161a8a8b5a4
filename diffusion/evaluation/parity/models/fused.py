"""Split layers under one gate, against the fused layer that published gates were trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.evaluation.parity.models.subjects import (
    three_adapters,
    unit_base,
    with_drawn_gates,
)
from diffusion.evaluation.parity.worst import Check, relative_error, worst
from diffusion.fusion import GatedFusion
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.family import Placed

TOKENS = 7


def fused_reference(
    model: Any, site: Placed, adapters: list[LoraBundle], gate: Any, x: Tensor
) -> Tensor:
    """Return the outputs of a fused layer by the gate over all outputs of each adapter.

    Args:
        model: Without adapters.
        site: The parts of the layer.
        adapters: Those that change a part of it.
        gate: Over all of its outputs.
        x: Inputs (N, D).
    """
    layers = [model.get_submodule(part) for part in site.parts]
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    outputs = []
    for bundle in adapters:
        rows = [
            bundle.delta_weight(part).to(x)
            if part in bundle.modules
            else x.new_zeros(size, site.in_features)
            for part, size in zip(site.parts, site.sizes, strict=True)
        ]
        outputs.append(x @ torch.cat(rows).mT)
    found: Tensor = gate(x @ weight.mT + bias, torch.stack(outputs, -2))
    return found


def in_double(bundle: LoraBundle) -> LoraBundle:
    """Return an adapter with factors in float64."""
    modules = {
        name: factors._replace(down=factors.down.double(), up=factors.up.double())
        for name, factors in bundle.modules.items()
    }
    return LoraBundle(bundle.family, modules)


@torch.no_grad()
def group_errors() -> Iterator[tuple[str, float]]:
    """Yield the errors of all groups of the base, in float64."""
    model = unit_base().double()
    adapters = {name: in_double(bundle) for name, bundle in three_adapters(model).items()}
    fusion = with_drawn_gates(GatedFusion(model, adapters, dtype=torch.float64))
    draw = torch.Generator().manual_seed(5)
    for site in fusion.sites:
        if len(site.parts) == 1:
            continue
        x = torch.randn(TOKENS, site.in_features, generator=draw, dtype=torch.float64)
        own = [b for b in adapters.values() if any(p in b.modules for p in site.parts)]
        expected = fused_reference(model, site, own, fusion.gate(site.name), x)
        with fusion:
            found = torch.cat([model.get_submodule(part)(x) for part in site.parts], -1)
        yield site.name, relative_error(found, expected)


def check_fused(folder: str | Path) -> dict[str, Check]:
    """Compare groups of split layers with fused ones."""
    del folder
    return {"groups of split layers against fused ones": worst(group_errors())}
