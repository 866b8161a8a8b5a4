"""What a monitor measures of gates that multiply, of activations and of mixtures."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.numerics import widest_float


def exact(values: Tensor) -> Tensor:
    """Return the values in the widest floating dtype of their device."""
    return values.to(widest_float(values.device))


def join(parts: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """Return the parts as one flat vector in the order of ``sizes``."""
    return torch.cat([exact(parts[name]).reshape(-1) for name in sizes])


def split(total: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the named parts of a flat vector."""
    return dict(zip(sizes, total.split_with_sizes(list(sizes.values())), strict=True))


def counts(indices: Tensor, counted: Tensor, size: int) -> Tensor:
    """Return how often each of ``size`` indices occurs where ``counted``; others are clamped.

    ``torch.bincount`` would read its size on the host on CUDA; this does not.
    """
    zeros = torch.zeros(size, dtype=widest_float(indices.device), device=indices.device)
    indices, counted = indices.clamp(0, size - 1).flatten(), exact(counted).flatten()
    return zeros.scatter_add(0, indices, counted)


@dataclass(frozen=True)
class ValueStatistics:
    """Mean, spread and saturation of gate values between 0 and 1.

    Args:
        bins: Bins of the histogram over [0, 1]; values beyond count in the first or last bin.
    """

    bins: int = 20

    @property
    def sizes(self) -> dict[str, int]:
        """Name and length of each part of the flat vector."""
        scalars = ("values", "non_finite", "sum", "squares", "zero", "closed", "open")
        return dict.fromkeys(scalars, 1) | {"histogram": self.bins}

    def sums(self, values: Tensor) -> Tensor:
        """Return the flat sums of gate values of any shape."""
        values = exact(values.detach().flatten())
        finite = values.isfinite()
        values = values.masked_fill(~finite, 0)
        parts = {
            "values": finite.sum(),
            "non_finite": (~finite).sum(),
            "sum": values.sum(),
            "squares": values.square().sum(),
            "zero": (finite & (values == 0)).sum(),
            "closed": (finite & (values < 0.1)).sum(),
            "open": (finite & (values > 0.9)).sum(),
            "histogram": counts((values * self.bins).long(), finite, self.bins),
        }
        return join(parts, self.sizes)

    def figures(self, total: Tensor) -> dict[str, float]:
        """Return the figures of a total; without any value only the two counts.

        ``values`` measured; ``non_finite`` ones; ``mean`` and population ``std``; ``zero``, the
        fraction that is exactly 0; ``closed`` and ``open``, the fractions below 0.1 and above 0.9.
        """
        parts = {k: float(v.sum()) for k, v in split(total, self.sizes).items()}
        figures = {"values": parts["values"], "non_finite": parts["non_finite"]}
        if parts["values"] == 0:
            return figures
        for name in ("zero", "closed", "open"):
            figures[name] = parts[name] / parts["values"]
        figures["mean"] = parts["sum"] / parts["values"]
        variance = parts["squares"] / parts["values"] - figures["mean"] ** 2
        figures["std"] = max(variance, 0.0) ** 0.5
        return figures

    def distributions(self, total: Tensor) -> dict[str, Tensor]:
        """Return the ``histogram`` of a total, as counts."""
        return {"histogram": split(total, self.sizes)["histogram"]}


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
        matrices = {"matrix": matrix.view(self.num_gates, self.num_experts)}
        if self.values is None:
            return matrices
        return self.values.distributions(self._of_values(total)) | matrices

    def _value_figures(self, total: Tensor) -> dict[str, float]:
        return {} if self.values is None else self.values.figures(self._of_values(total))

    def _of_values(self, total: Tensor) -> Tensor:
        assert self.values is not None
        return total[: sum(self.values.sizes.values())]
