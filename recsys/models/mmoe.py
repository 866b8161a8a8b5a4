"""Shared networks and experts: one bottom, and experts mixed by one gate or by one per task."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.gates.mixture import MultiGate
from core_gates.moe.normed_experts import NormedExperts
from core_gates.routing.collect import collect_routing
from recsys.models.net import (
    ExpertLayer,
    MultiTaskNet,
    Towers,
    expert_layer,
    mixture,
    routed_mixture,
    whole,
)
from recsys.schema import Labels


class SingleTask(MultiTaskNet):
    """A network per task, all of them in one module; they share the embeddings at most.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        own_embeddings: Whether every task has its own embeddings, too, as T models trained
            separately have them; the input is then (B, T, D).
        dim: Features of a task's network, the input of its tower.
        hidden_dims: Features of the layers before.
        norm: ``batch``: normalize every layer before its activation; None for none.
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
        tasks: Labels,
        *,
        own_embeddings: bool = False,
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
        number = len(self.tasks)
        self.copies = number if own_embeddings else 1
        self.bottoms = NormedExperts(
            [1] * number,
            input_dim,
            [*hidden_dims, dim],
            norm=norm,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.towers = Towers(
            number,
            dim,
            tower_dims,
            norm=tower_norm,
            activation=tower_activation,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D), or (B, T, D) with own embeddings."""
        return self.towers(self.bottoms(v))

    @property
    def shared_copies(self) -> Sequence[int]:
        """The only set of embeddings; none with own embeddings."""
        return range(self.copies == 1)


class Linear(MultiTaskNet):
    """``logit_t = w_t v + b_t``: with a product among the inputs a factorization machine.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        self.linear = nn.Linear(input_dim, len(self.tasks), device=device, dtype=dtype)

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        return cast(Tensor, self.linear(v))


class SharedBottom(MultiTaskNet):
    """``logit_t = Tower_t(f(v))`` with one network f (Caruana, 1997).

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        dim: Features of the shared network, the input of the towers.
        hidden_dims: Features of the layers before.
        norm: ``batch``: normalize every layer before its activation; None for none.
        activation: Of the shared network.
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
        self.bottom = NormedExperts(
            [1],
            input_dim,
            [*hidden_dims, dim],
            norm=norm,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.towers = Towers(
            len(self.tasks),
            dim,
            tower_dims,
            norm=tower_norm,
            activation=tower_activation,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        return self.towers(self.bottom(v)[:, 0])

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return all parameters of the shared network."""
        return whole(self.bottom)


class MMoE(MultiTaskNet):
    """``h_t = Σ_e gate_t(v)_e E_e(v)``, one gate per task (Ma et al., 2018).

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        num_experts: Number of experts.
        dim: Features of an expert's output.
        hidden_dims: Features of an expert's layers before.
        norm: ``batch``: normalize every layer of the experts before its activation; None: do not,
            as published.
        activation: Of the experts.
        gate: ``softmax``, or a routing gate of ``core_gates.gates`` such as ``DSelectKGate``,
            ``CometGate``, ``NoisyTopKGate`` or ``HashGate``.
        gate_options: Options of that routing gate.
        gate_dims: Features of hidden layers of the softmax gates.
        gate_norm: ``batch``: normalize every layer of a softmax gate, its logits included.
        gate_loss: Weight of the losses that routing gates make themselves.
        gate_feature: Sparse feature by whose value a ``HashGate`` routes.
        tower_dims: Features of the hidden layers of a tower.
        tower_norm: Normalization of those, ``batch`` or None.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, a name or an option of the gate is unknown, or a ``HashGate``
            has no feature.
    """

    one_gate = False

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        num_experts: int = 8,
        dim: int = 64,
        hidden_dims: Sequence[int] = (128,),
        norm: str | None = None,
        activation: str = "relu",
        gate: str = "softmax",
        gate_options: Mapping[str, Any] | None = None,
        gate_dims: Sequence[int] = (),
        gate_norm: str | None = None,
        gate_loss: float = 0.01,
        gate_feature: str = "",
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [*hidden_dims, dim]
        self.experts = NormedExperts(
            num_experts, input_dim, dims, norm=norm, activation=activation, **where
        )
        self.gate_names = ("all",) if self.one_gate else tuple(task.name for task in self.tasks)
        mask = torch.ones(len(self.gate_names), num_experts, dtype=torch.bool)
        self.mixture: nn.Module
        if gate == "softmax":
            if gate_options:
                raise ValueError(
                    f"gate_options {dict(gate_options)} belong to a routing gate, but gate is "
                    "softmax; give its gate_dims and gate_norm"
                )
            self.mixture = mixture(input_dim, mask, hidden_dims=gate_dims, norm=gate_norm, **where)
        else:
            self.mixture = routed_mixture(gate, gate_options or {}, input_dim, mask, **where)
        if (gate == "HashGate") != bool(gate_feature):
            raise ValueError(
                "gate_feature is the sparse feature by which a HashGate routes, got gate "
                f"{gate} with gate_feature {gate_feature!r}"
            )
        self.id_feature, self.gate_loss = gate_feature, gate_loss
        if gate_feature:
            self.num_ids = (gate_options or {}).get("num_ids")
        self._gate_losses: dict[str, Tensor] = {}
        self.towers = Towers(
            len(self.tasks), dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        mixed = self._mixed(v, ids)
        return self.towers(mixed[:, 0] if self.one_gate else mixed)

    def losses(self, logits: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the losses of the routing gates, summed over gates, times their weight."""
        losses, self._gate_losses = self._gate_losses, {}
        return {name: self.gate_loss * loss for name, loss in losses.items()}

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return all parameters of the experts, and of the gate if there is one for all tasks."""
        return whole(self.experts, self.mixture if self.one_gate else None)

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the experts and their gates."""
        counts = {"shared": self.experts.num_experts}
        return [expert_layer("layer 1", self.experts, self.mixture, counts, self.gate_names)]

    def _mixed(self, v: Tensor, ids: Tensor | None) -> Tensor:
        if not isinstance(self.mixture, MultiGate):
            mixed: Tensor = self.mixture(v, self.experts(v))
            return mixed
        if not self.training:
            return self.mixture(v, self.experts(v), ids=ids)
        with collect_routing(self.mixture) as routings:
            mixed = self.mixture(v, self.experts(v), ids=ids)
        gate_losses: dict[str, Tensor] = {}
        for routing in (r for collected in routings.values() for r in collected):
            for name, loss in (routing.aux or {}).items():
                gate_losses[f"gate_{name}"] = gate_losses.get(f"gate_{name}", 0) + loss
        self._gate_losses = gate_losses
        return mixed


class OMoE(MMoE):
    """``h = Σ_e gate(v)_e E_e(v)``: one gate for all tasks (Ma et al., 2018, section 3).

    Its options are those of `MMoE`.
    """

    one_gate = True
