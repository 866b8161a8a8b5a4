"""What the expert layer is measured against: other ways to compute the same."""

import importlib
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates import Gate, StackedExperts


class NaiveLoop(nn.Module):
    """One expert after the other, ``weight[e]`` indexed, results added where they belong."""

    def __init__(self, gate: Gate, experts: StackedExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (T, D)."""
        routing = self.gate(x)
        y = torch.zeros_like(x)
        for expert in range(self.experts.num_experts):
            token, choice = (routing.indices == expert).nonzero(as_tuple=True)
            out = self.experts.single(x[token], expert)
            y = y.index_add(0, token, out * routing.weights[token, choice].unsqueeze(-1))
        return y


class GroupedMm(nn.Module):
    """The way of torchtitan: sort, two ``grouped_mm``, scale, add to where the rows came from."""

    def __init__(self, gate: Gate, experts: StackedExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (T, D)."""
        routing = self.gate(x)
        chosen = routing.indices.flatten()
        order = chosen.argsort(stable=True)
        token = order // routing.indices.shape[-1]
        counts = torch.bincount(chosen, minlength=self.experts.num_experts)
        offsets = counts.cumsum(0, dtype=torch.int32)
        up, down = self.experts.get_parameter("up_proj"), self.experts.down_proj
        hidden = F.silu(F.grouped_mm(x[token], up.mT, offs=offsets))
        out = F.grouped_mm(hidden, down.mT, offs=offsets)
        out = out * routing.weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, out)


class Transformers(nn.Module):
    """The experts of Mixtral in transformers, after the same gate and with the same weights."""

    def __init__(self, gate: Gate, experts: StackedExperts, implementation: str) -> None:
        super().__init__()
        transformers: Any = importlib.import_module("transformers")
        mixtral: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
        config = transformers.MixtralConfig(
            hidden_size=experts.dim,
            intermediate_size=experts.hidden_dim,
            num_local_experts=experts.num_experts,
        )
        config._experts_implementation = implementation
        self.gate, self.experts = gate, mixtral.MixtralExperts(config)
        self.experts.load_state_dict(experts.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (T, D)."""
        routing = self.gate(x)
        return cast(Tensor, self.experts(x, routing.indices, routing.weights))


def has_transformers() -> bool:
    """Return whether the library can be imported."""
    return importlib.util.find_spec("transformers") is not None
