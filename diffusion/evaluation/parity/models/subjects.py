"""What checks run on: an untrained base of width 32, random adapters of it, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.fusion import GatedFusion
from diffusion.fusion.sites import linear_sizes
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.flow_matching import velocity
from diffusion.models.text import TextStates
from diffusion.models.tiny_flux import transformer_of


class Inputs(NamedTuple):
    """Latents (B, 16, 4, 4), times (B,) and captions of a batch of two."""

    x: Tensor
    t: Tensor
    text: TextStates


def unit_base() -> Any:
    """Return the frozen base of width 32, with one block of each kind."""
    torch.manual_seed(0)
    return transformer_of("unit").eval().requires_grad_(False)


def unit_inputs() -> Inputs:
    """Return inputs of the base."""
    torch.manual_seed(1)
    text = TextStates(torch.randn(2, 5, 384), torch.randn(2, 384))
    return Inputs(torch.randn(2, 16, 4, 4), torch.tensor([0.2, 0.9]), text)


def random_adapter(
    model: nn.Module, seed: int, family: str = "flux", rank: int = 2, where: str = "blocks"
) -> LoraBundle:
    """Return an adapter of the layers whose names hold a text."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (inputs, outputs) in linear_sizes(model).items():
        if where in name:
            down, up = (torch.randn(*s, generator=draw) for s in ((rank, inputs), (outputs, rank)))
            modules[name] = Factors(0.2 * down, 0.2 * up, 1.0)
    return LoraBundle(family, modules)


def three_adapters(model: nn.Module) -> dict[str, LoraBundle]:
    """Return adapters of three ranks, of which two change some layers only."""
    return {
        "a": random_adapter(model, 1),
        "b": random_adapter(model, 2, rank=3, where="attn"),
        "c": random_adapter(model, 3, rank=1, where="single_transformer_blocks"),
    }


@torch.no_grad()
def predicted(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what a model predicts (B, 16, 4, 4)."""
    return velocity(model, *inputs)


@torch.no_grad()
def merged_into(model: nn.Module, adapters: Mapping[str, LoraBundle]) -> Any:
    """Return a copy of the model with adapters added to its weights."""
    made = deepcopy(model)
    for bundle in adapters.values():
        for name in bundle.modules:
            made.get_submodule(name).weight += bundle.delta_weight(name)  # type: ignore[operator]
    return made


def with_drawn_gates(fusion: GatedFusion, seed: int = 3) -> GatedFusion:
    """Draw the parameters of gates, which are then far from a plain sum."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=draw))
    return fusion
