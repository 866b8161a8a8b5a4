"""Routing ahead of time: the gate of a later MoE layer reads the input of an earlier one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core_gates.errors import check_at_least
from core_gates.numerics import lowest_index_top_k
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput

Ahead = Mapping[int, RoutingOutput]


class PreGate:
    """Decide the routing of MoE layer l at layer l - N (Pre-gated MoE, Hwang et al., 2024).

    Both experts and weights come from the earlier gate input, so the choice is final when it is
    made, and the experts can be fetched meanwhile; they still compute on their own layer's input
    layer. The first N layers route by their own input. No gate is added: the pre-gate of layer l is
    the gate of layer l, which looks N layers back, so a trained model converts as it is (and needs
    fine-tuning)::

        pre_gate, ahead = PreGate([layer.gate for layer in layers], level=1), {}
        for l, (norm, layer) in enumerate(zip(norms, layers)):
            u = norm(x)
            routing, ahead = pre_gate(l, u, ahead)  # ahead[l + 1].indices: experts to fetch
            x = x + layer(u, routing=routing)[0]

    It holds no state: what is decided travels in ``ahead``, which activation checkpointing and
    several streams can keep apart. The gates belong to their layers.

    Args:
        gates: Gate of every MoE layer, in order; dense layers do not count. An encoder and a
            decoder are two chains.
        level: N, layers between the decision and its use.

    Raises:
        ValueError: ``level`` is below 1 or there is no gate.
    """

    def __init__(self, gates: Sequence[Gate], *, level: int = 1) -> None:
        check_at_least(1, level=level)
        if not gates:
            raise ValueError("a pre-gated stack needs the gate of at least one MoE layer")
        self.gates = tuple(gates)
        self.level = level

    def __call__(
        self,
        layer: int,
        x: Tensor,
        ahead: Ahead,
        *,
        ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[RoutingOutput, dict[int, RoutingOutput]]:
        """Return the routing of a layer and decide that of the layer ``level`` further on.

        Args:
            layer: Number of the MoE layer, counted from 0.
            x: Its gate input (..., D).
            ahead: What this returned for the layer before; empty for the first.
            ids: Token or user numbers (...), for gates that route by identity.
            padding_mask: True (...) at tokens to ignore.

        Returns:
            The routing of this layer, and those decided for later ones by number.

        Raises:
            ValueError: There is no such layer, or its routing was not decided in time.
        """
        if not 0 <= layer < len(self.gates):
            raise ValueError(f"layer must lie between 0 and {len(self.gates) - 1}, got {layer}")
        if layer >= self.level and layer not in ahead:
            raise ValueError(
                f"the routing of layer {layer} is decided at layer {layer - self.level}, but"
                f" ahead holds layers {sorted(ahead)}; call every layer in order and pass on ahead"
            )
        later = {number: routing for number, routing in ahead.items() if number > layer}
        target = layer + self.level
        if target < len(self.gates):
            later[target] = self.gates[target](x, ids=ids, padding_mask=padding_mask)
        if layer >= self.level:
            return ahead[layer], later
        return self.gates[layer](x, ids=ids, padding_mask=padding_mask), later


class CrossLayerPredictor:
    """Guess the experts of a later layer by its own gate on an earlier input (Fate, 2025).

    The residual stream changes slowly, so the gate of layer l + 1 applied to the gate input of
    layer l mostly finds the experts that layer l + 1 will choose. A guess decides what is fetched;
    the true gate still decides what is computed, unless the guess is passed on as ``routing=``.

    It calls the gate itself, with its normalization, groups and biases, as in evaluation: without
    noise, without gradient, and unseen by ``collect_routing`` and ``update_gates``.

    Args:
        gate: Gate of the later layer, whose routings have indices; it belongs to that layer.
        width: Experts guessed for each token, at least those the gate chooses, which is the
            default.
    """

    def __init__(self, gate: Gate, *, width: int | None = None) -> None:
        self.gate = gate
        self.width = width

    @torch.no_grad()
    def __call__(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> RoutingOutput:
        """Return the predicted routing of the later layer.

        Args:
            x: Gate input (..., D) of the earlier layer.
            ids: Token or user numbers (...), for gates that route by identity.
            padding_mask: True (...) at tokens to ignore, for which nothing is to be fetched.

        Returns:
            The gate's routing with ``width`` choices in descending order: first its own, then the
            most probable others with weight zero and ``kept`` False.

        Raises:
            ValueError: ``width`` is below the choices of the gate or above its experts, or the gate
                gives no indices.
        """
        modes = [(module, module.training) for module in self.gate.modules()]
        self.gate.eval()
        try:
            routing = self.gate.forward(x, ids=ids, padding_mask=padding_mask)  # without hooks
        finally:
            for module, mode in modes:  # an inner gate may be frozen in another one
                module.training = mode
        return self._widened(routing)

    def _widened(self, routing: RoutingOutput) -> RoutingOutput:
        indices, kept = routing.indices, routing.kept
        name = type(self.gate).__name__
        scores = routing.probs if routing.probs is not None else routing.logits
        if indices is None or scores is None:
            raise ValueError(f"{name} gives no indices with scores: guess by a gate of k choices")
        k = indices.shape[-1]
        width = k if self.width is None else self.width
        if not k <= width <= self.gate.num_experts:
            raise ValueError(
                f"width must lie between the {k} choices of {name} and its"
                f" {self.gate.num_experts} experts, got {width}"
            )
        if width == k:
            return routing
        others = scores.scatter(-1, indices, -torch.inf)
        spare = lowest_index_top_k(others, width - k)[1]
        kept = torch.ones_like(indices, dtype=torch.bool) if kept is None else kept
        return routing._replace(
            weights=torch.cat([routing.weights, routing.weights.new_zeros(spare.shape)], -1),
            indices=torch.cat([indices, spare], -1),
            kept=torch.cat([kept, torch.zeros_like(spare, dtype=torch.bool)], -1),
        )


def prediction_recall(predicted: RoutingOutput, actual: RoutingOutput) -> Tensor:
    """Return the recall (...): the fraction of the experts a token really uses that were predicted.

    It is NaN for tokens that use none, and in the wider dtype of the weights of the two.

    Args:
        predicted: Routing of a predictor; all of its choices count, kept or not.
        actual: Routing of the layer itself.

    Raises:
        ValueError: A routing has no indices.
    """
    if predicted.indices is None or actual.indices is None:
        raise ValueError("recall compares indices, but a routing is dense: use to_top_k(k)")
    hits = (actual.indices.unsqueeze(-1) == predicted.indices.unsqueeze(-2)).any(-1)
    used = torch.ones_like(hits) if actual.kept is None else actual.kept
    dtype = torch.promote_types(predicted.weights.dtype, actual.weights.dtype)
    return (hits & used).sum(-1).to(dtype) / used.sum(-1)


def fetch_order(predicted: RoutingOutput, num_experts: int | None = None) -> tuple[Tensor, Tensor]:
    """Order the experts of a batch by how many tokens are predicted to use them (Fate).

    Popular experts come first, so that their computation covers the transfer of the rare ones.
    Only kept choices count: ignored tokens and spare guesses fetch nothing.

    Args:
        predicted: Routing of a predictor.
        num_experts: Needed where the routing does not know it.

    Returns:
        Experts by descending count (E,), equal counts by ascending number, and their counts; those
        that no token uses come last, with count zero.
    """
    chosen = predicted.chosen(num_experts, dropped=False)
    counts = chosen.reshape(-1, chosen.shape[-1]).sum(0).long()
    order = counts.argsort(descending=True, stable=True)
    return order, counts[order]
