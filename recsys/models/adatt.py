"""Experts of tasks that all tasks see, with free weights for a task's own.

B rows, T tasks, U units (the tasks, and the shared one), E experts, D inputs, F features.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from recsys.models.experts import Experts
from recsys.models.gating import GateNetworks
from recsys.models.net import ExpertLayer, MultiTaskNet, expert_layer
from recsys.models.towers import Towers
from recsys.schema import Task


class AdaTTMixture(nn.Module):
    """``h_u = Σ_e softmax(G_u x_u)_e E_e + Σ_j s_uj E_uj`` with free s (Li et al., 2023).

    The weights s of a unit's native experts start uniform in ±1/√n over n experts; the only native
    expert of a unit has weight 1, which is not learned.

    Args:
        dim: Features of the gates' input.
        native: True where an expert belongs to the unit of a gate (U, E).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, U, dim), experts (B, E, F); result (B, U, F).
    """

    places: Tensor
    free: Tensor

    def __init__(
        self,
        dim: int,
        native: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.native, self.counts = native.cpu(), native.sum(-1)
        everything = torch.ones_like(native)
        self.gates = GateNetworks(dim, everything, own_inputs=True, device=device, dtype=dtype)
        number = int(native.sum())
        self.residual = nn.Parameter(torch.empty(number, device=device, dtype=dtype))
        places = torch.empty(number, device=device, dtype=torch.int64)
        free = torch.empty(number, device=device, dtype=torch.bool)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("free", free, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the free weights and reset the gates."""
        self.gates.reset_parameters()
        self.places.copy_(self.native.flatten().nonzero().flatten())
        counts = self.counts.repeat_interleave(self.counts)
        self.free.copy_(counts > 1)
        with torch.no_grad():
            bounds = counts.to(self.residual).rsqrt()
            self.residual.uniform_(-1, 1).mul_(bounds)
            self.residual.copy_(torch.where(self.free, self.residual, 1))

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights (B, U, E) of the gates and, added, of the native experts."""
        weights = self.gates.weights(x)
        residual = torch.where(self.free, self.residual, 1).to(weights.dtype)
        table = residual.new_zeros(self.native.numel()).index_copy(0, self.places, residual)
        return weights + table.view(self.native.shape)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the mixtures (B, U, F) of the outputs of the experts (B, E, F)."""
        return self.weights(x) @ experts


class AdaTTLayer(nn.Module):
    """A level of AdaTT: units of native experts, whose gates see the experts of all units.

    Args:
        counts: Native experts of each unit: the tasks, then the shared one if there is one.
        dim: Features D of the inputs.
        expert_dims: Features of the experts' layers, the last of which are those of the output F.
        num_gates: Units that have a gate; the shared one has none in the last level.
        norm: Of the experts, ``batch`` or None.
        activation: Of the experts.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, U, D), or (B, D) if all units read the same; to (B, ``num_gates``, F).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def __init__(
        self,
        counts: Sequence[int],
        dim: int,
        expert_dims: Sequence[int],
        *,
        num_gates: int,
        norm: str | None = None,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts = Experts(counts, dim, expert_dims, norm=norm, activation=activation, **where)
        owners = [unit for unit, count in enumerate(counts) for _ in range(count)]
        native = torch.tensor([[o == unit for o in owners] for unit in range(num_gates)])
        self.num_gates = num_gates
        self.mixture = AdaTTMixture(dim, native, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the units that have a gate."""
        units = x if x.ndim == 3 else x.unsqueeze(1).expand(-1, self.num_gates, -1)
        mixed: Tensor = self.mixture(units[:, : self.num_gates], self.experts(x))
        return mixed


class AdaTT(MultiTaskNet):
    """Adaptive task-to-task fusion (Li et al., 2023), with shared experts or without.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        levels: Levels of fusion.
        num_task_experts: Native experts of each task, in each level.
        num_shared_experts: Experts of a further unit that no task owns; 0 for none (AdaTT-sp).
        dim: Features of an expert's output.
        hidden_dims: Features of an expert's layers before.
        norm: ``batch``: normalize every layer of the experts before its activation; None: do not,
            as published.
        activation: Of the experts.
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
        levels: int = 2,
        num_task_experts: int = 1,
        num_shared_experts: int = 0,
        dim: int = 64,
        hidden_dims: Sequence[int] = (128,),
        norm: str | None = None,
        activation: str = "relu",
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        check_at_least(1, levels=levels, num_task_experts=num_task_experts)
        check_at_least(0, num_shared_experts=num_shared_experts)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        number = len(self.tasks)
        counts = [num_task_experts] * number + [num_shared_experts] * bool(num_shared_experts)
        self.layers = nn.ModuleList(
            AdaTTLayer(
                counts,
                dim if level else input_dim,
                [*hidden_dims, dim],
                num_gates=number if level == levels - 1 else len(counts),
                norm=norm,
                activation=activation,
                **where,
            )
            for level in range(levels)
        )
        self.towers = Towers(
            number, dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        x = v
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.towers(x)
        return logits

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return weights and biases of the last layer of the last level's experts: all see them."""
        experts = self._levels()[-1].experts
        return [experts.weights[-1], experts.biases[-1]]

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return all parameters of the experts."""
        return [part for layer in self._levels() for part in layer.experts.rows_from(0)]

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the levels."""
        names = [*(task.name for task in self.tasks), "shared"]
        return [
            expert_layer(
                f"level {number}",
                layer.experts,
                layer.mixture,
                dict(zip(names, layer.experts.counts, strict=False)),
                names[: layer.num_gates],
            )
            for number, layer in enumerate(self._levels(), 1)
        ]

    def _levels(self) -> list[AdaTTLayer]:
        return cast(list[AdaTTLayer], list(self.layers))
