"""Features and hidden units scaled by what is known of a user beforehand.

B rows, T tasks, D inputs, P features of the prior.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.features.prior import PriorGate
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import MultiTaskNet
from recsys.models.sharing import whole
from recsys.models.towers import Towers
from recsys.schema import Task


class PEPNet(MultiTaskNet):
    """A network per task whose inputs and hidden units a prior scales (Chang et al., 2023).

    A gate of the prior scales the inputs (EPNet), one per layer scales the hidden units of the
    networks of all tasks (PPNet). The gradient of the gates does not reach the inputs.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted.
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
        logits: Tensor = self.towers(x)
        return logits

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the gate of the inputs, and the hidden layers of the other gates."""
        gates = [cast(PriorGate, gate) for gate in self.gates]
        hidden = [p for gate in gates for p in (gate.hidden_weight, gate.hidden_bias)]
        return [*whole(self.input_gate), *((p, slice(None)) for p in hidden)]
