"""What is measured of the outputs of experts: do they differ in scale, do their units die?

Each observation becomes a flat vector of sums without being read on the host. A value that is not
finite is counted, not added, and reaches the host with the other sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.monitor.sums import exact, join, split

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

    def sums(self, outputs: Tensor, experts: Tensor | None = None) -> Tensor:
        """Return the flat sums of the outputs of experts.

        Args:
            outputs: Outputs (..., E, D), of any shape for one expert, or (..., D) of ``experts``.
            experts: The expert of each output (...), int64; E where it is not to be measured.

        Raises:
            ValueError: The outputs are not those of E experts.
        """
        if experts is None:
            experts = self._experts_in_turn(outputs)
        expert = experts.flatten()
        values = exact(outputs.detach()).reshape(len(expert), outputs.shape[-1])

        def total(part: Tensor) -> Tensor:
            zeros = values.new_zeros(self.num_experts + 1)  # the last for what is not measured
            return zeros.index_add(0, expert, part.sum(1, dtype=values.dtype))

        finite = values.isfinite()
        values = values.masked_fill(~finite, 0)
        number = total(finite).clamp(min=1)
        mean = total(values) / number
        std = (total(values.square()) / number - mean.square()).clamp(min=0).sqrt()
        near = values.abs() < NEAR_ZERO * std[expert].unsqueeze(-1)
        zero = values == 0
        parts = {
            "values": finite,
            "non_finite": ~finite,
            "zero": finite & zero,
            "near_zero": finite & (near | zero),
            "sum": values,
            "squares": values.square(),
        }
        return join({name: total(part)[:-1] for name, part in parts.items()}, self.sizes)

    def _experts_in_turn(self, outputs: Tensor) -> Tensor:
        if self.num_experts == 1:
            return torch.zeros(outputs.shape[:-1], dtype=torch.int64, device=outputs.device)
        if outputs.shape[-2:-1] != (self.num_experts,):
            raise ValueError(
                f"outputs {tuple(outputs.shape)} must be (..., {self.num_experts}, features)"
            )
        return torch.arange(self.num_experts, device=outputs.device).expand(outputs.shape[:-1])

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any value only the two counts.

        ``activations`` measured; ``non_finite`` ones; ``zero_rate`` and ``near_zero_rate``, the
        fractions that are exactly 0, or below 0.05 standard deviations of their expert in one
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
