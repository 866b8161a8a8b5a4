"""Hooks on the layers of experts of a network: outputs of experts, weights of gates.

B rows, E experts, F features of an expert, S gates.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from core_gates.gates.mixture import MaskedMixture
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
            ``residual_weights`` as well; or if its ``gates`` have ``weights`` (AdaTT). Where an
            expert has several outputs, ``of_experts`` adds their weights up.
        *inputs: Those of its ``forward``, without the outputs of the experts.
        **options: Further ones.
    """
    if isinstance(mixture, MaskedMixture):
        packed = mixture.gate_values(inputs[0], inputs[0])
        tables = packed.new_zeros(*packed.shape[:-1], mixture.tables.numel())
        tables = tables.index_copy(-1, mixture.places, packed).unflatten(-1, mixture.tables.shape)
        of_experts = getattr(mixture, "of_experts", lambda weights: weights)
        parts = [of_experts(part) for part in tables.unbind(-3)]
        return GateWeights(parts[0], parts[1] if len(parts) == 2 else None)
    total = mixture.weights(*inputs, **options)  # type: ignore[operator]
    if callable(residual := getattr(mixture, "residual_weights", None)):
        path = residual(*inputs, **options)
        return GateWeights(total - path, path)
    if callable(own := getattr(getattr(mixture, "gates", None), "weights", None)):
        gates = own(*inputs, **options)
        return GateWeights(gates, total - gates)
    return GateWeights(total, None)


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
