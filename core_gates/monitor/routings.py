"""What is measured of a routing gate.

Each observation becomes a flat vector of sums without being read on the host. A token that is
not finite is counted, not added, and reaches the host with the other sums.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from core_gates.monitor.values import counts, exact, join, split
from core_gates.numerics import widest_float
from core_gates.routing.output import RoutingOutput

MAX_COACTIVE = 256
"""Gates of more experts have no table of the pairs that work together: it grows as E²."""


class Choices(NamedTuple):
    """Which experts every token uses, to be compared with another routing of it.

    Attributes:
        used: True at the experts of a token (..., E).
        measured: False where a token is ignored or not finite (...).
    """

    used: Tensor
    measured: Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """Load, entropy, activity and change of a routing gate.

    Args:
        num_experts: Number of experts E.
        bins: Bins of the histogram of routed weights over [0, 1].
        dead_share: An expert is dead if its fraction of the load is below ``dead_share / E``.
    """

    num_experts: int
    bins: int = 20
    dead_share: float = 0.1

    @property
    def sizes(self) -> dict[str, int]:
        """Name and length of each part of the flat vector."""
        experts = self.num_experts
        return dict.fromkeys(_SCALARS, 1) | {
            "load": experts,
            "importance": experts,
            "active": experts + 1,
            "coactivation": experts**2 if experts <= MAX_COACTIVE else 0,
            "histogram": self.bins,
        }

    def sums(self, routing: RoutingOutput, padding_mask: Tensor | None = None) -> Tensor:
        """Return the flat sums of one routing; tokens under the mask do not count."""
        weights = exact(routing.to_dense(self.num_experts).weights)
        finite = weights.isfinite().all(-1)
        counted = torch.ones_like(finite) if padding_mask is None else ~padding_mask
        measured = counted & finite
        kept = _where(measured, exact(routing.chosen(self.num_experts, dropped=False)))
        chosen = _where(measured, exact(routing.chosen(self.num_experts)))
        weights = _where(measured, weights)
        used = exact(kept > 0).reshape(-1, self.num_experts)
        parts = {
            "tokens": measured.sum(),
            "non_finite": (counted & ~finite).sum(),
            "choices": chosen.sum(),
            "load": kept.reshape(-1, self.num_experts).sum(0),
            "importance": weights.reshape(-1, self.num_experts).sum(0),
            "active": counts((kept > 0).sum(-1), measured, self.num_experts + 1),
            "coactivation": used.mT @ used if self.sizes["coactivation"] else used[:0, 0],
            "histogram": counts((weights * self.bins).long(), weights != 0, self.bins),
        }
        if routing.probs is not None:
            probs = _where(measured, exact(routing.probs))
            parts["entropy"] = _entropy(probs).sum()
            captured = (probs * (kept > 0)).sum(-1) / _positive(probs.sum(-1))
            parts["captured"] = captured.sum()
            parts["scored"] = measured.sum()
        if routing.logits is not None:
            logits = _where(measured, exact(routing.logits))
            valid = measured.unsqueeze(-1) & logits.isfinite()
            parts["logits"] = valid.sum()
            parts["logit_squares"] = logits.masked_fill(~valid, 0).square().sum()
        return self._join(parts, weights)

    def choices(self, routing: RoutingOutput, padding_mask: Tensor | None = None) -> Choices:
        """Return which experts every token chose, dropped or not."""
        measured = routing.to_dense(self.num_experts).weights.isfinite().all(-1)
        if padding_mask is not None:
            measured = measured & ~padding_mask
        return Choices(routing.chosen(self.num_experts) > 0, measured)

    def changes(self, before: Choices, after: Choices) -> Tensor:
        """Return the flat sums of what changed between two routings of the same tokens.

        Raises:
            ValueError: The tokens are not the same.
        """
        if before.used.shape != after.used.shape:
            raise ValueError(
                f"the tokens {tuple(after.measured.shape)} of a probe must be those of the probe"
                f" before, {tuple(before.measured.shape)}; use one fixed batch"
            )
        compared = before.measured & after.measured
        changed = compared & (before.used != after.used).any(-1)
        return self._join({"compared": compared.sum(), "changed": changed.sum()}, after.used)

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any token only the two counts and ``churn``.

        ``tokens`` measured; ``non_finite`` tokens; ``entropy``, the mean entropy of the
        scores of a token (nats), and ``captured``, the mean fraction of the scores that fall on
        its experts (absent if the gate returns no ``probs``); ``logit_rms``, the root mean square
        of the logits; ``active``, the mean number of experts of a token; ``unrouted``, the fraction
        of tokens without any; ``dropped``, the fraction of choices not kept; ``load_cv``
        (population), ``load_entropy`` (nats) and ``load_max_violation`` (maximum / mean - 1) of the
        tokens per expert; ``importance_cv`` of the weight per expert; ``dead``, the number of
        experts with hardly any load; ``coactivation``, the largest overlap of two experts:
        tokens that use both over those that use either; ``churn``, the fraction of tokens that
        changed any expert between two probes.
        """
        parts = split(total, self.sizes)
        tokens = float(parts["tokens"])
        figures = {"tokens": tokens, "non_finite": float(parts["non_finite"])}
        if parts["compared"] > 0:
            figures["churn"] = float(parts["changed"] / parts["compared"])
        if tokens == 0:
            return figures
        if parts["scored"] > 0:
            figures["entropy"] = float(parts["entropy"] / parts["scored"])
            figures["captured"] = float(parts["captured"] / parts["scored"])
        if parts["logits"] > 0:
            figures["logit_rms"] = float((parts["logit_squares"] / parts["logits"]).sqrt())
        numbers = torch.arange(self.num_experts + 1, dtype=parts["active"].dtype)
        figures["active"] = float(parts["active"] @ numbers) / tokens
        figures["unrouted"] = float(parts["active"][0]) / tokens
        return figures | self._load_figures(parts)

    def distributions(self, total: Tensor) -> dict[str, Tensor]:
        """Return the distributions of a total, as counts.

        ``histogram`` of routed weights over [0, 1]; ``load`` and ``importance`` (E,); ``active``
        (E + 1,), the number of tokens with 0, 1, … experts; up to 256 experts, ``coactivation``
        (E, E), the number of tokens that use both.
        """
        parts = split(total, self.sizes)
        shown = {name: parts[name] for name in ("histogram", "load", "importance", "active")}
        if parts["coactivation"].numel():
            shown["coactivation"] = parts["coactivation"].view(self.num_experts, self.num_experts)
        return shown

    def _load_figures(self, parts: dict[str, Tensor]) -> dict[str, float]:
        load, figures = parts["load"], {}
        if parts["choices"] > 0:
            figures["dropped"] = 1 - float(load.sum() / parts["choices"])
        if load.sum() > 0:
            share = load / load.sum()
            figures["load_cv"] = _variation(load)
            figures["load_entropy"] = float(_entropy(share))
            figures["load_max_violation"] = float(share.max() * self.num_experts - 1)
            figures["importance_cv"] = _variation(parts["importance"])
            figures["dead"] = float((share < self.dead_share / self.num_experts).sum())
            if parts["coactivation"].numel() and self.num_experts > 1:
                figures["coactivation"] = _largest_overlap(parts["coactivation"], self.num_experts)
        return figures

    def _join(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        """Return the parts as a flat vector, zeros where one is absent."""
        absent = {
            name: torch.zeros(size, dtype=widest_float(like.device), device=like.device)
            for name, size in self.sizes.items()
            if name not in parts
        }
        return join(parts | absent, self.sizes)


_SCALARS = (
    "tokens",
    "non_finite",
    "choices",
    "entropy",
    "captured",
    "scored",
    "logits",
    "logit_squares",
    "compared",
    "changed",
)


def _where(condition: Tensor, values: Tensor) -> Tensor:
    shape = condition.shape + (1,) * (values.ndim - condition.ndim)
    return values.masked_fill(~condition.view(shape), 0)


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=torch.finfo(values.dtype).tiny)


def _entropy(scores: Tensor) -> Tensor:
    """Return the entropy (nats) of non-negative scores scaled to sum 1."""
    probs = scores / _positive(scores.sum(-1, keepdim=True))
    return cast(Tensor, torch.special.entr(probs).sum(-1))


def _variation(values: Tensor) -> float:
    return float(values.std(correction=0) / values.mean())


def _largest_overlap(coactivation: Tensor, num_experts: int) -> float:
    both = coactivation.view(num_experts, num_experts)
    alone = both.diagonal()
    either = alone.unsqueeze(0) + alone.unsqueeze(1) - both
    overlap = both / either.clamp(min=1)
    return float(overlap.masked_fill(torch.eye(num_experts, dtype=torch.bool), 0).max())
