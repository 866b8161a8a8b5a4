"""What is measured of the outputs of experts: do they differ in scale, do their units die?

Each observation becomes a flat vector of sums without being read on the host. A value that is not
finite is counted, not added, and reaches the host with the other sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.sums import join, split

NEAR_ZERO = 0.05
"""Values below this part of their expert's standard deviation are nearly zero."""


@dataclass(frozen=True)
class ActivationStatistics:
    """Zero-activation rate, mean and spread of the outputs of experts (arXiv 2408.05430).

    Args:
        num_experts: Number of experts E; outputs are (..., E, D), or of any shape for one.
    """

    num_experts: int

    @property
    def sizes(self) -> dict[str, int]:
        """Name and length of each part of the flat vector."""
        parts = ("values", "non_finite", "zero", "near_zero", "sum", "squares")
        return dict.fromkeys(parts, self.num_experts)

    def sums(self, outputs: Tensor) -> Tensor:
        """Return the flat sums of the outputs of experts.

        Raises:
            ValueError: The outputs are not those of E experts.
        """
        if self.num_experts > 1 and outputs.shape[-2:-1] != (self.num_experts,):
            raise ValueError(
                f"outputs {tuple(outputs.shape)} must be (..., {self.num_experts}, features)"
            )
        values = outputs.detach().double().reshape(-1, self.num_experts, outputs.shape[-1])
        finite = values.isfinite()
        values = values.masked_fill(~finite, 0)
        number = finite.sum((0, 2)).clamp(min=1)
        mean = values.sum((0, 2)) / number
        std = (values.square().sum((0, 2)) / number - mean.square()).clamp(min=0).sqrt()
        near = values.abs() < NEAR_ZERO * std.unsqueeze(-1)
        zero = values == 0
        parts = {
            "values": finite,
            "non_finite": ~finite,
            "zero": finite & zero,
            "near_zero": finite & (near | zero),
            "sum": values,
            "squares": values.square(),
        }
        return join({name: part.sum((0, 2)) for name, part in parts.items()}, self.sizes)

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any value only the two counts.

        ``activations`` measured; ``non_finite`` ones; ``zero_rate`` and ``near_zero_rate``, the
        shares that are exactly 0, or below 0.05 standard deviations of their expert in one
        observation, over all experts, and ``zero_rate_max`` of the worst expert; ``std_ratio``,
        the largest over the smallest standard deviation of an expert.
        """
        parts = split(total, self.sizes)
        measured = float(parts["values"].sum())
        figures = {"activations": measured, "non_finite": float(parts["non_finite"].sum())}
        if measured == 0:
            return figures
        figures["zero_rate"] = float(parts["zero"].sum()) / measured
        figures["near_zero_rate"] = float(parts["near_zero"].sum()) / measured
        experts = self.distributions(total)
        figures["zero_rate_max"] = float(experts["zero_rate"].max())
        figures["std_ratio"] = float(experts["std"].max() / experts["std"].min())
        return figures

    def distributions(self, total: Tensor) -> dict[str, Tensor]:
        """Return ``zero_rate``, ``mean`` and population ``std`` of every expert (E,)."""
        parts = split(total, self.sizes)
        number = parts["values"].clamp(min=1)
        mean = parts["sum"] / number
        variance = (parts["squares"] / number - mean.square()).clamp(min=0)
        return {
            "zero_rate": parts["zero"] / number,
            "mean": mean,
            "std": torch.sqrt(variance),
        }
