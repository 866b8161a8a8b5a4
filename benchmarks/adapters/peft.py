"""Several LoRAs next to a linear layer in PEFT, which adds their outputs without a gate.

PEFT (https://github.com/huggingface/peft, Apache-2.0) is not among the dependencies.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from core_gates.adapters import LowRank

ABSENT = "peft is not installed: pip install peft"


def is_installed() -> bool:
    """Return whether the peer can be imported."""
    return importlib.util.find_spec("peft") is not None


@torch.no_grad()
def active_adapters(linear: nn.Linear, adapters: Sequence[LowRank]) -> nn.Module:
    """Wrap a copy of a layer so that all adapters are active at once.

    Args:
        linear: The layer; it is copied.
        adapters: Adapters of this layer.

    Returns:
        A module from (..., D) to (..., D').
    """
    peft: Any = importlib.import_module("peft")
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    copy.load_state_dict(linear.state_dict())
    configs = {
        f"adapter{k}": peft.LoraConfig(r=a.rank, lora_alpha=a.rank * a.scale, target_modules=["0"])
        for k, a in enumerate(adapters)
    }
    first = next(iter(configs))
    model = peft.get_peft_model(nn.Sequential(copy), configs[first], adapter_name=first)
    for name, config in configs.items():
        if name != first:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, adapter in zip(configs, adapters, strict=True):
        layer.lora_A[name].weight.copy_(adapter.down)
        layer.lora_B[name].weight.copy_(adapter.up)
    model.base_model.set_adapter(list(configs))
    return cast(nn.Module, layer)
