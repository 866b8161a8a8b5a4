"""Features and hidden units scaled by what is known of a user beforehand.

B rows, T tasks, D inputs, P features of the prior.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.activations import activate, check_activation
from core_gates.errors import check_at_least
from recsys.models.experts import stacked_linear
from recsys.models.net import MultiTaskNet
from recsys.models.towers import Towers
from recsys.schema import Task


class PriorGate(nn.Module):
    """``2 σ(W2 relu(W1 [prior, x]))`` without gradient to x (Chang et al., 2023).

    Args:
        prior_dim: Features P of the prior; 0 for none.
        dim: Features D of x.
        out_dim: Number of factors.
        hidden_dim: Features of the hidden layer.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``prior`` (B, P) and ``x`` (B, D) to factors (B, ``out_dim``) in (0, 2).
    """

    def __init__(
        self,
        prior_dim: int,
        dim: int,
        out_dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(prior_dim + dim, hidden_dim, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_dim, out_dim, device=device, dtype=dtype)

    def forward(self, prior: Tensor | None, x: Tensor) -> Tensor:
        """Return the factors."""
        x = x.detach()
        inputs = x if prior is None else torch.cat([prior, x], -1)
        return 2 * self.out(F.relu(self.hidden(inputs))).sigmoid()


class PEPNet(MultiTaskNet):
    """A network per task whose inputs and hidden units a prior scales (Chang et al., 2023).

    A gate of the prior scales the inputs (EPNet), one per layer scales the hidden units of the
    networks of all tasks (PPNet). The gradient of the gates does not reach the inputs.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        prior_dim: Features P of the prior; without one the gates read the inputs alone.
        gate_dim: Features of the hidden layer of a gate.
        dim: Features of a task's network, the input of its tower.
        hidden_dims: Features of the layers before.
        activation: Of the network.
        tower_dims: Features of the hidden layers of a tower.
        tower_norm: Normalization of those, ``batch`` or None.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[Task],
        *,
        prior_dim: int = 0,
        gate_dim: int = 32,
        dim: int = 64,
        hidden_dims: Sequence[int] = (128,),
        activation: str = "relu",
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        check_at_least(0, prior_dim=prior_dim)
        check_at_least(1, gate_dim=gate_dim, dim=dim)
        check_activation(activation)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prior_dim, self.activation, number = prior_dim, activation, len(self.tasks)
        sizes = [input_dim, *hidden_dims, dim]
        self.input_gate = PriorGate(prior_dim, input_dim, input_dim, gate_dim, **where)
        self.layers = nn.ModuleList(
            TaskLayer(number, inputs, outputs, **where) for inputs, outputs in pairwise(sizes)
        )
        self.gates = nn.ModuleList(
            PriorGate(prior_dim, input_dim, number * size, gate_dim, **where) for size in sizes[1:]
        )
        self.towers = Towers(
            number, dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D) and their priors (B, P).

        Raises:
            ValueError: The prior has other features than ``prior_dim``.
        """
        found = 0 if prior is None else prior.shape[-1]
        if found != self.prior_dim:
            raise ValueError(f"the prior must have {self.prior_dim} features, found {found}")
        v = v * self.input_gate(prior, v)
        x = v
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = activate(layer(x), self.activation, gated=False)
            x = x * gate(prior, v).view(x.shape)
        logits: Tensor = self.towers(x)
        return logits


class TaskLayer(nn.Module):
    """A linear layer per task, side by side.

    Args:
        num_tasks: Number of tasks T.
        dim: Features of the input.
        out_dim: Features of the output.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, ``dim``) or (B, T, ``dim``) to (B, T, ``out_dim``).
    """

    def __init__(
        self,
        num_tasks: int,
        dim: int,
        out_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_tasks, out_dim, dim, **where))
        self.bias = nn.Parameter(torch.empty(num_tasks, out_dim, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all tasks."""
        return stacked_linear(x, self.weight, self.bias)
