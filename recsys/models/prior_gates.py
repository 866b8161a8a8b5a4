"""Embeddings of tasks (STEM), and features scaled by what is known beforehand (PEPNet)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.features.prior import PriorGate
from core_gates.gates.mixture import MaskedMixture
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import ExpertLayer, MultiTaskNet, Towers, expert_layer, rows_from, whole
from recsys.schema import Labels


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
        tasks: What is predicted: tasks, their names, or names with categories.
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
        tasks: Labels,
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
        return self.towers(self.mixture(v[:, :-1], self.experts(v)))

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


class PEPNet(MultiTaskNet):
    """A network per task whose inputs and hidden units a prior scales (Chang et al., 2023).

    A gate of the prior scales the inputs (EPNet), one per layer scales the hidden units of the
    networks of all tasks (PPNet). The gradient of the gates does not reach the inputs.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        prior_dim: Features P of the prior, such as the embedding of the user.
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
        ValueError: A size is below 1, a name is unknown, or there is no prior.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
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
        if prior_dim < 1:
            raise ValueError(
                "the gates need a prior, such as the embedding of the user: name its features in"
                f" prior, or give its width as prior_dim, got {prior_dim}"
            )
        check_at_least(1, gate_dim=gate_dim, dim=dim)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prior_dim, number = prior_dim, len(self.tasks)
        sizes = [input_dim, *hidden_dims, dim]
        self.input_gate = PriorGate(input_dim, prior_dim, gate_dim, **where)
        self.layers = nn.ModuleList(
            NormedExperts(number, inputs, [outputs], norm=None, activation=activation, **where)
            for inputs, outputs in pairwise(sizes)
        )
        self.gates = nn.ModuleList(
            PriorGate(number * size, prior_dim, gate_dim, input_dim=input_dim, **where)
            for size in sizes[1:]
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
        if prior is None or prior.shape[-1] != self.prior_dim:
            found = 0 if prior is None else prior.shape[-1]
            raise ValueError(f"the prior must have {self.prior_dim} features, found {found}")
        v = self.input_gate(v, prior)
        x = v
        for layer, gate in zip(self.layers, self.gates, strict=True):
            units = layer(x)
            x = gate(units.flatten(1), prior, seen=v).view(units.shape)
        return self.towers(x)

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the gate of the inputs, and the hidden layers of the other gates."""
        gates = [cast(PriorGate, gate) for gate in self.gates]
        hidden = [p for gate in gates for p in (gate.hidden_weight, gate.hidden_bias)]
        return [*whole(self.input_gate), *((p, slice(None)) for p in hidden)]
