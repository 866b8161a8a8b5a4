"""The dense feed-forward network, and reading one whatever its layers are called."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "fc1", "fc2"),
    (None, "w1", "w2"),
)
_ACTIVATION_OF = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.Identity: "identity"}


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020), the network whose copies are experts.

    Args:
        dim: Features of a token.
        hidden_dim: Hidden features.
        activation: Element-wise module; SiLU if not given.
        bias: Whether the layers have biases.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D) to the same.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: nn.Module | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias, device, dtype)
        self.activation = nn.SiLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network to every token."""
        return cast(Tensor, self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))


class DenseMlp(NamedTuple):
    """Weights (F, D) of ``gate`` and ``up``, (D, F) of ``down``, their biases, the activation."""

    up: Tensor
    down: Tensor
    activation: str
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    def stacked(self) -> dict[str, Tensor]:
        """Return the parameters of one of the stacked experts by name."""
        first, bias, name = self.up, self.up_bias, "up_proj"
        if self.gate is not None:
            first, name = torch.cat([self.gate, self.up]), "gate_up_proj"
            if self.gate_bias is not None and self.up_bias is not None:
                bias = torch.cat([self.gate_bias, self.up_bias])
        found = {name: first, "down_proj": self.down}
        if bias is not None and self.down_bias is not None:
            found |= {f"{name}_bias": bias, "down_proj_bias": self.down_bias}
        return found


def read_mlp(mlp: nn.Module, activation: str | None = None) -> DenseMlp:
    """Take a dense network apart.

    Args:
        mlp: The network; see :meth:`StackedExperts.from_dense` for the names of its layers.
        activation: Name of its activation, needed where no submodule shows it.

    Raises:
        ValueError: The layers are not found, some have biases and others none, or the activation
            is not found.
    """
    gate, up, down = _layers(mlp)
    layers = [layer for layer in (gate, up, down) if layer is not None]
    if len({layer.bias is None for layer in layers}) > 1:
        raise ValueError("either all layers of the network must have a bias, or none")
    return DenseMlp(
        up.weight,
        down.weight,
        activation or _activation(mlp),
        None if gate is None else gate.weight,
        up.bias,
        down.bias,
        None if gate is None else gate.bias,
    )


def _layers(mlp: nn.Module) -> tuple[nn.Linear | None, nn.Linear, nn.Linear]:
    linear = {name: child for name, child in mlp.named_children() if isinstance(child, nn.Linear)}
    for gate, up, down in _NAMES:
        wanted = {up, down} if gate is None else {gate, up, down}
        if wanted == set(linear):
            return None if gate is None else linear[gate], linear[up], linear[down]
    if isinstance(mlp, nn.Sequential) and len(linear) == 2:
        first, second = linear.values()
        return None, first, second
    known = ", ".join(" ".join(n for n in names if n) for names in _NAMES)
    raise ValueError(
        f"the linear layers of {type(mlp).__name__} are named {', '.join(linear) or 'nothing'};"
        f" expected {known}, or a Sequential of two"
    )


def _activation(mlp: nn.Module) -> str:
    found = [module for module in mlp.modules() if type(module) in _ACTIVATION_OF]
    if len(found) != 1:
        raise ValueError(
            f"the activation of {type(mlp).__name__} is not evident from its submodules; pass"
            " activation="
        )
    if isinstance(found[0], nn.GELU) and found[0].approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATION_OF[type(found[0])]
