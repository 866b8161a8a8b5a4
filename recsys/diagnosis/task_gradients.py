"""Gradients that every task sends to every expert.

B rows, T tasks, E experts, P parameters of an expert.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.models.net import ExpertLayer

TaskLosses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Logits (B, T), labels (B, T), mask (B, T), weights (B,) -> losses (T,)."""


class LayerGradients(NamedTuple):
    """What the gradients of tasks do at one layer.

    Attributes:
        norms: ‖∂L_t/∂θ_e‖ (T, E).
        cosines: Cosine between the gradients of two tasks at the shared experts (T, T); NaN where
            a task sends none.
    """

    norms: Tensor
    cosines: Tensor


class TaskGradients:
    """Sums over batches of the gradient of every task with respect to every expert.

    Args:
        layers: Those of a network. A layer whose parameters do not belong to one expert each has
            no gradients here; ``left_out`` names it.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._layers = [layer for layer in layers if _by_expert(layer)]
        self.left_out = [layer.name for layer in layers if not _by_expert(layer)]
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Tensor, rows: int) -> None:
        """Add the gradients of mean losses (T,), times the rows of their batch.

        Args:
            losses: With their graph, which is kept until the last task.
            rows: Of the batch.
        """
        parameters = [list(layer.experts.parameters()) for layer in self._layers]
        flat = [parameter for group in parameters for parameter in group]
        known = [p for p in flat if p.requires_grad]
        if not known or not losses.requires_grad:
            return
        found: list[list[Tensor]] = [[] for _ in self._layers]
        for task, loss in enumerate(losses):
            keep = task < len(losses) - 1
            grads = torch.autograd.grad(loss, known, retain_graph=keep, allow_unused=True)
            by_parameter = dict(zip(map(id, known), grads, strict=True))
            for layer, group, tasks in zip(self._layers, parameters, found, strict=True):
                experts = len(layer.expert_names)
                parts = [_or_zero(by_parameter.get(id(p)), p).reshape(experts, -1) for p in group]
                tasks.append(torch.cat(parts, 1))
        for layer, tasks in zip(self._layers, found, strict=True):
            total = rows * torch.stack(tasks)
            old = self._sums.get(layer.name)
            self._sums[layer.name] = total if old is None else old + total

    def of(self, layer: ExpertLayer, shared: Tensor) -> LayerGradients | None:
        """Return what was found at a layer; None without gradients.

        Args:
            layer: One of the layers.
            shared: True at the experts that tasks share (E,).
        """
        total = self._sums.get(layer.name)
        if total is None:
            return None
        together = total[:, shared.to(total.device)].flatten(1).double()
        length = together.norm(dim=1)
        unit = together / length.clamp(min=1e-300)[:, None]
        cosines = (unit @ unit.mT).clamp(-1, 1)
        silent = length == 0
        cosines = cosines.masked_fill(silent[:, None] | silent, torch.nan)
        return LayerGradients(total.norm(dim=-1).double().cpu(), cosines.cpu())


def cross_entropies(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean log-loss of every task (T,), over the rows where it counts.

    Args:
        logits: (B, T).
        labels: (B, T), 0 or 1; anything where masked.
        mask: (B, T).
        weight: (B,).
    """
    counted = weight.unsqueeze(-1) * mask
    known = labels.masked_fill(~mask, 0).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, known, reduction="none")
    return (losses * counted).sum(0) / counted.sum(0).clamp(min=1e-12)


def _by_expert(layer: ExpertLayer) -> bool:
    experts = len(layer.expert_names)
    return all(p.numel() % experts == 0 for p in layer.experts.parameters())


def _or_zero(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad
