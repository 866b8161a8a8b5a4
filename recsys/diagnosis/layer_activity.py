"""What is measured of layers of experts: outputs, weights of gates, gradients of tasks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.gates.mixture import MaskedMixture, MultiGate
from core_gates.monitor.values import ActivationStatistics, exact, split
from recsys.models.net import ExpertLayer


class GateWeights(NamedTuple):
    """What the gates of a mixture give to the experts.

    Attributes:
        gates: Weights (B, S, E) of the gates.
        residual: Weights (B, S, E) or (S, E) of a residual path, such as self gates; None without.
    """

    gates: Tensor
    residual: Tensor | None


class Watcher(Protocol):
    """What is told of every forward pass of a layer."""

    def add_outputs(self, outputs: Tensor) -> None:
        """Take outputs (..., E, F) of the experts."""

    def add_weights(self, weights: GateWeights) -> None:
        """Take the weights of the gates."""


@contextmanager
def observed(layers: Sequence[ExpertLayer], watchers: Sequence[Watcher]) -> Iterator[None]:
    """Tell a watcher per layer what its experts and gates do inside the block, without gradients.

    Args:
        layers: Those of a network.
        watchers: One for each.
    """
    handles = []
    for layer, watcher in zip(layers, watchers, strict=True):
        outputs, weights = _hook(watcher.add_outputs), _gate_hook(watcher.add_weights)
        handles.append(layer.experts.register_forward_hook(outputs))
        handles.append(layer.mixture.register_forward_hook(weights, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gate_weights(mixture: nn.Module, *inputs: Any, **options: Any) -> GateWeights:
    """Return the weights of a mixture, those of a residual path on their own.

    Args:
        mixture: A module with ``weights``, which hold a residual path, added, if it offers
            ``residual_weights`` as well; or if its ``gates`` have ``weights`` (AdaTT).
        *inputs: Those of its ``forward``, without the outputs of the experts.
        **options: Further ones.
    """
    if isinstance(mixture, MaskedMixture):
        gates = mixture.weights(inputs[0], residual=False)
        path = mixture.weights(inputs[0], residual=True) - gates
        return GateWeights(gates, path if path.any() else None)
    total = mixture.weights(*inputs, **options)  # type: ignore[operator]
    if callable(residual := getattr(mixture, "residual_weights", None)):
        path = residual(*inputs, **options)
        return GateWeights(total - path, path)
    if callable(weights_of := getattr(getattr(mixture, "gates", None), "weights", None)):
        gates = weights_of(*inputs, **options)
        return GateWeights(gates, total - gates)
    return GateWeights(total, None)


def visible_experts(mixture: nn.Module) -> Tensor | None:
    """Return where the mask of a mixture lets a gate see an expert (S, E); None without a mask.

    Args:
        mixture: Its ``expert_of_output`` names the expert of each column of the mask, where an
            expert has several.
    """
    if isinstance(mixture, MultiGate):
        seen = torch.zeros(mixture.shape, dtype=torch.bool)
        seen.view(-1)[mixture.places.cpu()] = True
        return seen
    if not isinstance(mixture, MaskedMixture):
        return None
    seen = mixture.tables[0].cpu()
    owners: Sequence[int] | None = getattr(mixture, "expert_of_output", None)
    if owners is None:
        return seen
    counts = torch.zeros(len(seen), max(owners) + 1, dtype=torch.int64)
    return counts.index_add(1, torch.tensor(list(owners)), seen.long()) > 0


def _hook(add: Callable[[Tensor], None]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, outputs: Tensor) -> None:  # noqa: ARG001
        with torch.no_grad():
            add(outputs.detach())

    return hook


def _gate_hook(add: Callable[[GateWeights], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        further = {name: value for name, value in options.items() if name != "experts"}
        with torch.no_grad():
            add(gate_weights(module, inputs[0], **further))

    return hook


class LayerActivity:
    """Sums of a layer of experts, without values of single rows.

    Args:
        num_experts: Number of experts E.
        num_gates: Number of gates S.
        expert_of_output: Expert of each output O; one output per expert by default.
        rank_rows: Rows of which the effective rank is computed.
        visible: Where a gate sees an expert (S, E); where it ever gives one a weight by default.

    Attributes:
        visible: As given, or as seen so far.
    """

    def __init__(
        self,
        num_experts: int,
        num_gates: int,
        *,
        expert_of_output: Sequence[int] | None = None,
        rank_rows: int = 1024,
        visible: Tensor | None = None,
    ) -> None:
        self.num_experts, self.num_gates = num_experts, num_gates
        self._owners = torch.tensor(
            range(num_experts) if expert_of_output is None else list(expert_of_output)
        )
        self._statistics = ActivationStatistics(num_experts)
        self._sums: Tensor | None = None
        self._rank_rows = rank_rows
        self._rows: list[Tensor] = []
        self.weight_rows = 0
        self._gates = torch.zeros(num_gates, num_experts, dtype=torch.float64)
        self._residual: Tensor | None = None
        self._entropy = torch.zeros(num_gates, dtype=torch.float64)
        self._masked = visible is not None
        unseen = torch.zeros(num_gates, num_experts, dtype=torch.bool)
        self.visible = unseen if visible is None else visible

    @property
    def seen(self) -> bool:
        """Whether the layer ran at all."""
        return self._sums is not None and self.weight_rows > 0

    def add_outputs(self, outputs: Tensor) -> None:
        """Add outputs (..., O, F) of the experts."""
        outputs = outputs.flatten(0, -3)
        owners = self._owners.to(outputs.device).expand(outputs.shape[:-1])
        sums = self._statistics.sums(outputs, owners).cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        if (missing := self._rank_rows - sum(map(len, self._rows))) > 0:
            self._rows.append(exact(outputs[:missing]).cpu())

    def add_weights(self, weights: GateWeights) -> None:
        """Add the weights of the gates."""
        gates = exact(weights.gates).flatten(0, -3)
        self.weight_rows += len(gates)
        self._gates += gates.sum(0).cpu()
        if not self._masked:
            self.visible |= (gates != 0).any(0).cpu()
        fractions = gates.clamp(min=0)
        fractions = fractions / fractions.sum(-1, keepdim=True).clamp(min=1e-300)
        self._entropy += torch.special.entr(fractions).sum((0, -1)).cpu()
        if weights.residual is not None:
            residual = exact(weights.residual).expand_as(weights.gates).flatten(0, -3).sum(0).cpu()
            self._residual = residual if self._residual is None else self._residual + residual

    def activations(self) -> dict[str, Tensor]:
        """Return ``zero_rate``, ``near_zero_rate``, ``mean``, ``std``, ``effective_rank`` (E,)."""
        assert self._sums is not None
        parts = split(self._sums.double(), self._statistics.sizes)
        number = parts["values"].clamp(min=1)
        distributions = self._statistics.distributions(self._sums.double())
        distributions["near_zero_rate"] = parts["near_zero"] / number
        rows = torch.cat(self._rows)
        of_expert = [rows[:, self._owners == e].flatten(0, 1) for e in range(self.num_experts)]
        distributions["effective_rank"] = torch.stack(
            [effective_rank(moments_of_expert) for moments_of_expert in of_expert]
        )
        return distributions

    def gates(self) -> dict[str, Tensor]:
        """Return the mean ``weights`` and ``residual`` (S, E), and ``row_entropy`` (S,).

        ``residual`` is absent without such a path.
        """
        rows = max(self.weight_rows, 1)
        means = {"weights": self._gates / rows, "row_entropy": self._entropy / rows}
        return means if self._residual is None else means | {"residual": self._residual / rows}


def effective_rank(outputs: Tensor) -> Tensor:
    """Return exp(H(σ / Σσ)) of an expert (), σ the singular values of its centered outputs.

    Roy and Vetterli, *The effective rank*, 2007: 1 if all features move as one, F if all move
    alike and independently; 0 for an expert whose outputs do not vary.

    Args:
        outputs: (N, F); a value that is not finite makes the rank NaN.
    """
    centered = outputs - outputs.mean(0)
    gram = centered.mT @ centered
    if not gram.isfinite().all():
        return gram.new_tensor(torch.nan)
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    singular = values.masked_fill(values < 1e-12 * values[-1], 0).sqrt()  # without rounding errors
    total = singular.sum()
    entropy = torch.special.entr(singular / total.clamp(min=1e-300)).sum()
    return torch.where(total > 0, entropy.exp(), 0.0)


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
        trainable = [p for p in flat if p.requires_grad]
        if not trainable or not losses.requires_grad:
            return
        gradients: list[list[Tensor]] = [[] for _ in self._layers]
        for task, loss in enumerate(losses):
            keep = task < len(losses) - 1
            grads = torch.autograd.grad(loss, trainable, retain_graph=keep, allow_unused=True)
            by_parameter = dict(zip(map(id, trainable), grads, strict=True))
            for layer, group, tasks in zip(self._layers, parameters, gradients, strict=True):
                experts = len(layer.expert_names)
                parts = [_or_zero(by_parameter.get(id(p)), p).reshape(experts, -1) for p in group]
                tasks.append(torch.cat(parts, 1))
        for layer, tasks in zip(self._layers, gradients, strict=True):
            total = rows * torch.stack(tasks)
            old = self._sums.get(layer.name)
            self._sums[layer.name] = total if old is None else old + total

    def of(self, layer: ExpertLayer, shared: Tensor) -> LayerGradients | None:
        """Return gradient norms by task and expert, and cosines of tasks, at a layer; None if none.

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
    targets = labels.masked_fill(~mask, 0).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * counted).sum(0) / counted.sum(0).clamp(min=1e-12)


def _by_expert(layer: ExpertLayer) -> bool:
    experts = len(layer.expert_names)
    return all(p.numel() % experts == 0 for p in layer.experts.parameters())


def _or_zero(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad
