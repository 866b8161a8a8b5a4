"""Several LoRAs on a whole model in PEFT, which adds their outputs without gates."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.adapters import ABSENT, is_installed
from diffusion.lora_file import LoraBundle

__all__ = ["ABSENT", "is_installed", "with_peft"]


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
