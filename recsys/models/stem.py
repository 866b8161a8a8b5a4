"""Embeddings of tasks and shared ones, with gradients that stay with their task.

B rows, T tasks, D inputs, E experts, F features of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.gates.mixture import MaskedMixture
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import ExpertLayer, MultiTaskNet, expert_layer, rows_from
from recsys.models.towers import Towers
from recsys.schema import Task


class GuardedMixture(MaskedMixture):
    """Gates with an input each that see all experts, but teach only some of them.

    Args:
        dim: Features of a gate's input.
        taught: True where the gradient of a gate's mixture reaches an expert (S, E).
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, S, dim), experts (B, E, F); result (B, S, F).
    """

    taught: Tensor

    def __init__(
        self,
        dim: int,
        taught: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        everything, number = torch.ones_like(taught), len(taught)
        super().__init__(dim, everything, reads=range(number), device=device, dtype=dtype)
        self._taught = taught.cpu()
        self.register_buffer("taught", torch.empty_like(taught, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the gates, and fill the table."""
        super().reset_parameters()
        if "taught" in self._buffers:  # not while the base class is being built
            self.taught.copy_(self._taught)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the mixtures (B, S, F) of the outputs of the experts (B, E, F)."""
        weights = self.weights(x).to(experts.dtype)
        taught = weights.masked_fill(~self.taught, 0) @ experts
        return taught + weights.masked_fill(self.taught, 0) @ experts.detach()


class STEM(MultiTaskNet):
    """Every task has its own embeddings, next to shared ones (Su et al., 2024).

    Experts of a task read its embeddings, shared experts read the shared ones. The gate of a task
    sees all experts, but the gradient of a task reaches its own and the shared ones only.

    Args:
        input_dim: Inputs D of a row, for each set of embeddings.
        tasks: What is predicted.
        num_task_experts: Experts of each task.
        num_shared_experts: Experts of the shared embeddings.
        dim: Features of an expert's output.
        hidden_dims: Features of an expert's layers before.
        norm: ``batch``: normalize every layer of the experts before its activation; None for none.
        activation: Of the experts.
        tower_dims: Features of the hidden layers of a tower.
        tower_norm: Normalization of those, ``batch`` or None.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Attributes:
        copies: T + 1; the shared set of embeddings is the last.

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[Task],
        *,
        num_task_experts: int = 1,
        num_shared_experts: int = 1,
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
        check_at_least(1, num_task_experts=num_task_experts, num_shared_experts=num_shared_experts)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        number = len(self.tasks)
        self.copies = number + 1
        counts = [*[num_task_experts] * number, num_shared_experts]
        self.experts = NormedExperts(
            counts, input_dim, [*hidden_dims, dim], norm=norm, activation=activation, **where
        )
        owners = [group for group, count in enumerate(counts) for _ in range(count)]
        self.shared_rows = slice(number * num_task_experts, None)
        taught = torch.tensor([[o in (task, number) for o in owners] for task in range(number)])
        self.mixture = GuardedMixture(input_dim, taught, **where)
        self.towers = Towers(
            number, dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, T + 1, D)."""
        mixed = self.mixture(v[:, :-1], self.experts(v))
        logits: Tensor = self.towers(mixed)
        return logits

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return weights and biases of the last layer of the experts."""
        return [self.experts.weights[-1], self.experts.biases[-1]]

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the shared experts."""
        return rows_from(self.experts, self.shared_rows.start)

    @property
    def shared_copies(self) -> Sequence[int]:
        """The last set of embeddings; gradients do not leave the set of a task."""
        return (len(self.tasks),)

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the experts and their gates."""
        names = [task.name for task in self.tasks]
        counts = dict(zip([*names, "shared"], self.experts.counts, strict=True))
        return [expert_layer("layer 1", self.experts, self.mixture, counts, names)]
