"""Stacked experts of the networks: one input for all, or one per group of experts.

N rows, G groups, E experts, D inputs, F features of an expert.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from core_gates.activations import activate, check_activation
from core_gates.errors import check_at_least, check_option
from core_gates.training.sync_batch_norm import SyncBatchNorm


class Experts(nn.Module):
    """E networks of layers ``act(W x + b)`` or ``act(BN(W x + b))``, the last layer included.

    Args:
        counts: Experts of each group.
        dim: Features D of the input.
        hidden_dims: Features of the layers, the last of which are those of the output F.
        norm: ``batch``, or None for no normalization.
        activation: ``silu`` (Swish), ``gelu``, ``gelu_tanh``, ``relu`` or ``identity``.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.

    Shape:
        ``x`` (N, D), which all experts see, or (N, G, D), one row per group; to (N, E, F).

    Raises:
        ValueError: A size is below 1, or norm or activation are unknown.
    """

    groups: Tensor

    def __init__(
        self,
        counts: Sequence[int],
        dim: int,
        hidden_dims: Sequence[int],
        *,
        norm: str | None = "batch",
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (dim, *hidden_dims)
        check_at_least(1, experts=sum(counts), layers=len(hidden_dims), width=min(sizes))
        check_at_least(0, experts=min(counts))
        check_option("norm", norm or "none", ("batch", "none"))
        check_activation(activation)
        self.num_experts = num_experts = sum(counts)
        self.counts, self.dim, self.activation = tuple(counts), dim, activation
        self.hidden_dims = tuple(hidden_dims)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList(parameter(outputs, inputs) for inputs, outputs in pairs)
        self.biases = nn.ParameterList(parameter(outputs) for _, outputs in pairs)
        self.norms = nn.ModuleList(
            SyncBatchNorm(outputs, num_experts=num_experts, device=device, dtype=dtype)
            for _, outputs in (pairs if norm else [])
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does; the affine map starts as the identity."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        for norm in self.norms:
            norm.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all experts (N, E, F).

        Raises:
            ValueError: The shape of ``x`` does not fit.
        """
        if x.shape[1:] not in ((self.dim,), (len(self.counts), self.dim)):
            raise ValueError(
                f"x {tuple(x.shape)} must be (N, {self.dim}) or (N, {len(self.counts)}, {self.dim})"
            )
        if x.ndim == 3 and len(self.counts) < self.num_experts:
            groups = [g for g, count in enumerate(self.counts) for _ in range(count)]
            x = torch.stack([x[:, g] for g in groups], 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = stacked_linear(x, weight, bias)
            x = self.norms[layer](x) if len(self.norms) else x
            x = activate(x, self.activation, gated=False)
        return x

    def rows_from(self, first: int) -> list[tuple[nn.Parameter, slice]]:
        """Return every parameter with its rows of the experts from ``first`` to the last."""
        return [
            (parameter, slice(first * (len(parameter) // self.num_experts), None))
            for parameter in self.parameters()
        ]

    def extra_repr(self) -> str:
        """Show the sizes in ``print(experts)``."""
        return (
            f"counts={self.counts}, dim={self.dim}, hidden_dims={self.hidden_dims},"
            f" activation={self.activation}"
        )


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``W_e x + b_e`` (N, E, O) for weights (E, O, I) and inputs (N, I) or (N, E, I)."""
    if x.ndim == 2:  # one matmul for all experts
        x = x @ weight.flatten(0, 1).mT
        return x.view(-1, *weight.shape[:2]) + bias
    return torch.einsum("nei,eoi->neo", x, weight) + bias
