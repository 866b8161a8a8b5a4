"""Hooks on the layers of experts of a network: outputs of experts, weights of gates.

B rows, E experts, F features of an expert, S gates.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from core_gates.gates.mixture import MaskedMixture, MultiGate
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
    if callable(own := getattr(getattr(mixture, "gates", None), "weights", None)):
        gates = own(*inputs, **options)
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
