"""The towers of all tasks, in one batched matmul per layer.

B rows, T tasks, D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from recsys.models.experts import Experts


class Towers(nn.Module):
    """One small network per task that ends in a logit: hidden layers, then a linear one.

    Args:
        num_tasks: Number of tasks T.
        dim: Features D of a tower's input.
        hidden_dims: Features of the hidden layers; empty for a linear tower.
        norm: ``batch``: normalize every hidden layer before its activation; None for none.
        activation: Of the hidden layers.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, T, D), or (B, D) if all towers read the same; to logits (B, T).

    Raises:
        ValueError: A size is below 1, or norm or activation are unknown.
    """

    def __init__(
        self,
        num_tasks: int,
        dim: int,
        hidden_dims: Sequence[int] = (64,),
        *,
        norm: str | None = None,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_tasks=num_tasks, dim=dim)
        options = {"norm": norm, "activation": activation, "device": device, "dtype": dtype}
        self.hidden = (
            Experts([1] * num_tasks, dim, hidden_dims, **options)  # type: ignore[arg-type]
            if hidden_dims
            else None
        )
        inputs = hidden_dims[-1] if hidden_dims else dim
        self.weight = nn.Parameter(torch.empty(num_tasks, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_tasks, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does."""
        if self.hidden is not None:
            self.hidden.reset_parameters()
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, T)."""
        h = x if self.hidden is None else self.hidden(x)
        if h.ndim == 2:
            return h @ self.weight.mT + self.bias
        return (h * self.weight).sum(-1) + self.bias  # a matmul of one column each is slow
