"""Eight experts that two gates share, one for each digit of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core_gates.errors import GatesError
from core_gates.routing.collect import collect_routing, update_gates
from core_gates.routing.output import RoutingOutput
from language.module import losses_of_gates
from studies.digits.gate_recipes import build_gate
from studies.digits.multi_digits import SIDE, Pairs

DIM, HIDDEN, CLASSES, TASKS = SIDE * SIDE, 64, 10, 2


class TwoDigitNetwork(L.LightningModule):
    """Name both digits of a pair: experts relu(x W_e), mixed by a gate and read by a head a task.

    Args:
        gate: Class of the gates.
        options: See `studies.digits.gate_recipes.build_gate`.
        losses: Weights of the auxiliary losses, means over both gates.
        learning_rate: Of Adam.
        num_steps: Of the training.
        num_experts: E, two at least.

    Raises:
        GatesError: There are fewer than two experts, or a gate refuses an option.
    """

    def __init__(
        self,
        gate: str,
        options: Mapping[str, Any],
        losses: Mapping[str, float],
        *,
        learning_rate: float = 1e-3,
        num_steps: int = 480,
        num_experts: int = 8,
    ) -> None:
        super().__init__()
        if num_experts < 2:
            raise GatesError(f"--experts is {num_experts}, expected two or more to choose from")
        self.losses, self.learning_rate = dict(losses), learning_rate
        bound = DIM**-0.5
        self.weight = nn.Parameter(torch.empty(num_experts, DIM, HIDDEN).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_experts, HIDDEN))
        self.gates = nn.ModuleList(
            build_gate(gate, options, dim=DIM, num_experts=num_experts, num_steps=num_steps)
            for _ in range(TASKS)
        )
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, CLASSES) for _ in range(TASKS))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return logits (N, 2, 10) of pairs with pixels x (N, 100) and ids (N,)."""
        experts = (torch.einsum("nd,edh->neh", x, self.weight) + self.bias).relu()
        mixed = [self._mixed(gate(x, ids=ids), x, experts) for gate in self.gates]
        return torch.stack([head(h) for head, h in zip(self.heads, mixed, strict=True)], 1)

    def _mixed(self, routing: RoutingOutput, x: Tensor, experts: Tensor) -> Tensor:
        """Return the mixture (N, 64) of experts (N, E, 64); experts of slots work on slots."""
        if routing.dispatch is None:
            weights = routing.to_dense(experts.shape[1]).weights
            return torch.einsum("ne,neh->nh", weights, experts)
        slots = torch.einsum("nes,nd->esd", routing.dispatch, x)
        made = (slots @ self.weight + self.bias.unsqueeze(1)).relu()
        return torch.einsum("nes,esh->nh", routing.weights, made)

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the sum of both cross-entropies and the weighted losses of the gates.

        Raises:
            GatesError: The loss is not finite.
        """
        with collect_routing(self) as routings:
            logits = self(batch.x, batch.ids)
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten()) * TASKS
        for name, value in losses_of_gates(routings, self.losses).items():
            loss = loss + self.losses[name] * value
        if not loss.isfinite():
            raise GatesError(
                f"the loss of step {self.global_step + 1} is {loss.item()}: lower the learning rate"
                f" ({self.learning_rate:g})"
            )
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then advance the gates."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        update_gates(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)


@torch.no_grad()
def right(network: TwoDigitNetwork, found: Pairs, batch: int = 512) -> Tensor:
    """Return whether each digit of each pair is named (N, 2), by an evaluating network.

    Args:
        network: Trained.
        found: Pairs.
        batch: Pairs that are routed together, which some gates depend on.
    """
    parts = zip(found.x.split(batch), found.ids.split(batch), strict=True)
    named = torch.cat([network(x, ids).argmax(-1) for x, ids in parts])
    return named == found.labels
