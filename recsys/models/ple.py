"""Experts of tasks and shared ones, in levels of extraction.

B rows, T tasks, D inputs, F features of an expert.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import (
    ExpertLayer,
    LeveledNet,
    Towers,
    expert_layer,
    gates_where,
    mixture,
    rows_from,
    whole,
)
from recsys.schema import Labels


class ExtractionLayer(nn.Module):
    """A level of PLE: a gate per task over own and shared experts, and one over all experts.

    Args:
        num_tasks: Number of tasks T.
        dim: Features D of the inputs.
        expert_dims: Features of the experts' layers, the last of which are those of the output F.
        num_task_experts: Experts of each task.
        num_shared_experts: Experts that all tasks share.
        first: Whether all read one input (B, D); else (B, T + 1, D), the shared one last.
        last: Whether the gate over all experts is left out.
        norm: Of the experts, ``batch`` or None.
        activation: Of the experts.
        gate_dims: Features of hidden layers of the gates.
        gate_norm: ``batch``: normalize every layer of a gate, its logits included.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, D) or (B, T + 1, D); to (B, T + 1, F), the shared one last, or (B, T, F).

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def __init__(
        self,
        num_tasks: int,
        dim: int,
        expert_dims: Sequence[int],
        *,
        num_task_experts: int = 1,
        num_shared_experts: int = 1,
        first: bool = True,
        last: bool = True,
        norm: str | None = None,
        activation: str = "relu",
        gate_dims: Sequence[int] = (),
        gate_norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_task_experts=num_task_experts, num_shared_experts=num_shared_experts)
        counts = [*[num_task_experts] * num_tasks, num_shared_experts]
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts = NormedExperts(
            counts, dim, expert_dims, norm=norm, activation=activation, **where
        )
        self.owners = [group for group, count in enumerate(counts) for _ in range(count)]
        groups = range(num_tasks if last else num_tasks + 1)
        mask = [[o in (g, num_tasks) or g == num_tasks for o in self.owners] for g in groups]
        self.last = last
        self.mixture = mixture(
            dim,
            torch.tensor(mask),
            hidden_dims=gate_dims,
            norm=gate_norm,
            own_inputs=not first,
            **where,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixtures (B, T or T + 1, F) of the tasks and, below the last level, shared.

        Args:
            x: (B, D) on the first level, the mixtures (B, T + 1, F) of the level before on others.
        """
        mixed: Tensor = self.mixture(x, self.experts(x))
        return mixed


class PLE(LeveledNet):
    """Progressive layered extraction (Tang et al., 2020).

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        levels: Levels of extraction; one is CGC.
        num_task_experts: Experts of each task, in each level.
        num_shared_experts: Experts that all tasks share, in each level.
        dim: Features of an expert's output.
        hidden_dims: Features of an expert's layers before.
        norm: ``batch``: normalize every layer of the experts before its activation; None: do not,
            as published.
        activation: Of the experts.
        gate_dims: Features of hidden layers of the gates.
        gate_norm: ``batch``: normalize every layer of a gate, its logits included.
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
        num_shared_experts: int = 1,
        dim: int = 64,
        hidden_dims: Sequence[int] = (128,),
        norm: str | None = None,
        activation: str = "relu",
        gate_dims: Sequence[int] = (),
        gate_norm: str | None = None,
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        check_at_least(1, levels=levels)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        number = len(self.tasks)
        self.layers = nn.ModuleList(
            ExtractionLayer(
                number,
                dim if level else input_dim,
                [*hidden_dims, dim],
                num_task_experts=num_task_experts,
                num_shared_experts=num_shared_experts,
                first=level == 0,
                last=level == levels - 1,
                norm=norm,
                activation=activation,
                gate_dims=gate_dims,
                gate_norm=gate_norm,
                **where,
            )
            for level in range(levels)
        )
        self.first_shared = number * num_task_experts
        self.towers = Towers(
            number, dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return what more than one gate or task sees.

        These are the shared experts of the last level, all experts of the level before and the gate
        over them, and all of the levels below.
        """
        *below, last = self._levels()
        references = rows_from(last.experts, self.first_shared)
        if below:
            *lowest, before = below
            shared = [False] * len(self.tasks) + [True]
            references += whole(before.experts, *lowest) + gates_where(before.mixture, shared)
        return references

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the levels."""
        names = [task.name for task in self.tasks]
        return [
            expert_layer(
                f"level {number}",
                layer.experts,
                layer.mixture,
                dict(zip([*names, "shared"], layer.experts.counts, strict=True)),
                names if layer.last else [*names, "shared"],
            )
            for number, layer in enumerate(self._levels(), 1)
        ]

    def _levels(self) -> list[ExtractionLayer]:
        return cast(list[ExtractionLayer], list(self.layers))


class CGC(PLE):
    """Customized gate control: PLE with one level (Tang et al., 2020, section 4.1).

    Its options are those of `PLE` without ``levels``.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        num_task_experts: int = 1,
        num_shared_experts: int = 1,
        dim: int = 64,
        hidden_dims: Sequence[int] = (128,),
        norm: str | None = None,
        activation: str = "relu",
        gate_dims: Sequence[int] = (),
        gate_norm: str | None = None,
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_dim,
            tasks,
            levels=1,
            num_task_experts=num_task_experts,
            num_shared_experts=num_shared_experts,
            dim=dim,
            hidden_dims=hidden_dims,
            norm=norm,
            activation=activation,
            gate_dims=gate_dims,
            gate_norm=gate_norm,
            tower_dims=tower_dims,
            tower_norm=tower_norm,
            tower_activation=tower_activation,
            device=device,
            dtype=dtype,
        )
