"""What is measured of a routing gate.

Each observation becomes a flat vector of sums without being read on the host. A position that is
not finite is counted, not added, and reaches the host with the other sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.gates.routing import RoutingOutput
from core_gates.sums import counts, join, split


@dataclass(frozen=True)
class RoutingStatistics:
    """Load, entropy and activity of a routing gate.

    Args:
        num_experts: Number of experts E.
        bins: Bins of the histogram of routed weights over [0, 1].
        dead_share: An expert is dead if its share of the load is below ``dead_share / E``.
    """

    num_experts: int
    bins: int = 20
    dead_share: float = 0.1

    @property
    def sizes(self) -> dict[str, int]:
        """Name and length of each part of the flat vector."""
        experts = self.num_experts
        return {
            "positions": 1,
            "non_finite": 1,
            "choices": 1,
            "entropy": 1,
            "scored": 1,
            "load": experts,
            "importance": experts,
            "active": experts + 1,
            "histogram": self.bins,
        }

    def sums(self, routing: RoutingOutput, padding_mask: Tensor | None = None) -> Tensor:
        """Return the flat sums of one routing; positions under the mask do not count."""
        weights = routing.to_dense(self.num_experts).weights.double()
        finite = weights.isfinite().all(-1)
        counted = torch.ones_like(finite) if padding_mask is None else ~padding_mask
        measured = counted & finite
        kept = _where(measured, routing.chosen(self.num_experts, dropped=False).double())
        chosen = _where(measured, routing.chosen(self.num_experts).double())
        weights = _where(measured, weights)
        parts = {
            "positions": measured.sum(),
            "non_finite": (counted & ~finite).sum(),
            "choices": chosen.sum(),
            "entropy": weights.new_zeros(()),
            "scored": weights.new_zeros(()),
            "load": kept.reshape(-1, self.num_experts).sum(0),
            "importance": weights.reshape(-1, self.num_experts).sum(0),
            "active": counts((kept > 0).sum(-1), measured, self.num_experts + 1),
            "histogram": counts((weights * self.bins).long(), weights != 0, self.bins),
        }
        if routing.probs is not None:
            parts["entropy"] = _where(measured, _entropy(routing.probs.double())).sum()
            parts["scored"] = measured.sum()
        return join(parts, self.sizes)

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any position only the two counts.

        ``positions`` measured; ``non_finite`` positions; ``entropy``, the mean entropy of the
        scores of a position (nats; absent if the gate returns no ``probs``); ``active``, the mean
        number of experts of a position; ``dropped``, the share of choices not kept; ``load_cv``
        (population), ``load_entropy`` (nats) and ``load_max_violation`` (maximum / mean - 1) of the
        positions per expert; ``importance_cv`` of the weight per expert; ``dead``, the number of
        experts with hardly any load.
        """
        parts = split(total, self.sizes)
        positions, choices = float(parts["positions"]), float(parts["choices"])
        figures = {"positions": positions, "non_finite": float(parts["non_finite"])}
        if positions == 0:
            return figures
        if parts["scored"] > 0:
            figures["entropy"] = float(parts["entropy"] / parts["scored"])
        numbers = torch.arange(self.num_experts + 1, dtype=parts["active"].dtype)
        figures["active"] = float(parts["active"] @ numbers) / positions
        load = parts["load"]
        if choices > 0:
            figures["dropped"] = 1 - float(load.sum()) / choices
        if load.sum() > 0:
            share = load / load.sum()
            figures["load_cv"] = _variation(load)
            figures["load_entropy"] = float(_entropy(share))
            figures["load_max_violation"] = float(share.max() * self.num_experts - 1)
            figures["importance_cv"] = _variation(parts["importance"])
            figures["dead"] = float((share < self.dead_share / self.num_experts).sum())
        return figures


def _where(condition: Tensor, values: Tensor) -> Tensor:
    shape = condition.shape + (1,) * (values.ndim - condition.ndim)
    return values.masked_fill(~condition.view(shape), 0)


def _entropy(scores: Tensor) -> Tensor:
    """Return the entropy (nats) of non-negative scores scaled to sum 1."""
    probs = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    entropy: Tensor = torch.special.entr(probs).sum(-1)
    return entropy


def _variation(values: Tensor) -> float:
    return float(values.std(correction=0) / values.mean())
