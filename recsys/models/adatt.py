"""Experts of tasks that all tasks see, with free weights for a task's own.

B rows, T tasks, U units (the tasks, and the shared one), E experts, D inputs, F features.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.gates.mixture import MaskedMixture
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import ExpertLayer, LeveledNet, Towers, expert_layer, whole
from recsys.schema import Labels


class AdaTTLayer(nn.Module):
    """A level of AdaTT: units of native experts, whose gates see the experts of all units.

    ``h_u = Σ_e softmax(G_u x_u)_e E_e + Σ_j s_uj E_uj`` with free weights s of a unit's native
    experts. The only native expert of a unit has weight 1, unless there are shared experts
    (Li et al., 2023, AdaTT-sp and AdaTT).

    Args:
        counts: Native experts of each unit: the tasks, then the shared one if there is one.
        dim: Features D of the inputs.
        expert_dims: Features of the experts' layers, the last of which are those of the output F.
        num_gates: Units that have a gate; the shared one has none in the last level.
        shared: Whether the last unit is the shared one.
        first: Whether all units read one input (B, D); else (B, U, D).
        norm: Of the experts, ``batch`` or None.
        activation: Of the experts.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, D) or (B, U, D) to (B, ``num_gates``, F).

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
        shared: bool,
        first: bool,
        norm: str | None = None,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts = NormedExperts(
            counts, dim, expert_dims, norm=norm, activation=activation, **where
        )
        owners = [unit for unit, count in enumerate(counts) for _ in range(count)]
        native = torch.tensor([[o == unit for o in owners] for unit in range(num_gates)])
        self.num_gates = num_gates
        self.mixture = MaskedMixture(
            dim,
            torch.ones_like(native),
            self_mask=native,
            self_weights="trained" if shared else "free",
            reads=None if first else range(num_gates),
            **where,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (B, ``num_gates``, F) of the units that have a gate."""
        mixed: Tensor = self.mixture(x, self.experts(x))
        return mixed


class AdaTT(LeveledNet):
    """Adaptive task-to-task fusion (Li et al., 2023), with shared experts or without.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
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
        tasks: Labels,
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
                shared=bool(num_shared_experts),
                first=level == 0,
                norm=norm,
                activation=activation,
                **where,
            )
            for level in range(levels)
        )
        self.towers = Towers(
            number, dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the experts, and all of the levels below the last: its gates see them."""
        *below, last = self._levels()
        return whole(*below, last.experts)

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
