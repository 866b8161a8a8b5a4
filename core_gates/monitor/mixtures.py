"""What is measured of gates that mix one set of experts: how much does each make of each?

Each observation becomes a flat vector of sums without being read on the host. Tokens with a weight
that is not finite are counted, not added, and reach the host with the other sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.monitor.sums import exact, join, split
from core_gates.monitor.values import ValueStatistics

DEAD = 0.01
"""An expert is dead if the mean weight that every gate gives it is below this."""


@dataclass(frozen=True)
class MixtureStatistics:
    """Mean weights of S gates and E experts.

    Args:
        num_gates: Number of gates S.
        num_experts: Number of experts E.
        values: How the single weights are measured, too; None where other statistics do.
    """

    num_gates: int
    num_experts: int
    values: ValueStatistics | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Name and length of each part of the flat vector."""
        mine = {"mixed": 1, "mixed_non_finite": 1, "matrix": self.num_gates * self.num_experts}
        return (self.values.sizes if self.values else {}) | mine

    def sums(
        self,
        weights: Tensor,
        padding_mask: Tensor | None = None,
        *,
        values: Tensor | None = None,
    ) -> Tensor:
        """Return the flat sums of the weights of gates.

        Args:
            weights: Weights (..., S, E).
            padding_mask: True (...) at tokens that do not count.
            values: Single weights of any shape, for ``values``.
        """
        weights = exact(weights.detach())
        finite = weights.isfinite().flatten(-2).all(-1)
        counted = torch.ones_like(finite) if padding_mask is None else ~padding_mask
        measured = counted & finite
        kept = weights.masked_fill(~measured[..., None, None], 0)
        parts = {
            "mixed": measured.sum(),
            "mixed_non_finite": (counted & ~finite).sum(),
            "matrix": kept.reshape(-1, self.num_gates * self.num_experts).sum(0),
        }
        mine = join(parts, {name: size for name, size in self.sizes.items() if name in parts})
        if self.values is None or values is None:
            return mine
        return torch.cat([self.values.sums(values), mine])

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any token only the counts.

        Besides those of the single weights: ``mixed`` tokens; ``mixed_non_finite`` ones;
        ``largest_mean_weight`` of a gate and an expert; ``mixture_entropy`` (nats) of the mean
        weights of a gate, averaged over gates; ``dead_experts``, to which every gate gives less
        than 1 % in the mean.
        """
        parts = split(total, self.sizes)
        figures = self._value_figures(total)
        figures["mixed"] = float(parts["mixed"])
        figures["mixed_non_finite"] = float(parts["mixed_non_finite"])
        if figures["mixed"] == 0:
            return figures
        matrix = self.distributions(total)["matrix"]
        share = matrix / matrix.sum(-1, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
        figures["largest_mean_weight"] = float(matrix.max())
        figures["mixture_entropy"] = float(torch.special.entr(share).sum(-1).mean())
        figures["dead_experts"] = float((matrix.amax(0) < DEAD).sum())
        return figures

    def distributions(self, total: Tensor) -> dict[str, Tensor]:
        """Return the ``matrix`` (S, E) of mean weights, and those of the single weights."""
        parts = split(total, self.sizes)
        matrix = parts["matrix"] / parts["mixed"].clamp(min=1)
        found = {"matrix": matrix.view(self.num_gates, self.num_experts)}
        if self.values is None:
            return found
        return self.values.distributions(self._of_values(total)) | found

    def _value_figures(self, total: Tensor) -> dict[str, float]:
        return {} if self.values is None else self.values.figures(self._of_values(total))

    def _of_values(self, total: Tensor) -> Tensor:
        assert self.values is not None
        return total[: sum(self.values.sizes.values())]
