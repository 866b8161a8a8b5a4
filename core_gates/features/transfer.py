"""The attention of AITM between a task and the one before it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import check_at_least


class TransferGate(nn.Module):
    """Weigh what a task knows against what the task before it passes on (AITM, KDD 2021).

    ``z = Σ_x∈{p, q} softmax_x(⟨h_1 x, h_2 x⟩ / √k) h_3 x`` with linear maps h of width k, for the
    transferred information p and the task's own representation q.

    Args:
        dim: Features D of both.
        hidden_dim: Width k of the maps; D if None.
        bias: Whether the maps have biases.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``p`` and ``q`` (..., D) to (..., k).

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, hidden_dim=hidden_dim)
        self.dim, self.hidden_dim = dim, dim if hidden_dim is None else hidden_dim
        empty = torch.empty(3, self.hidden_dim, dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty)
        self.bias = (
            nn.Parameter(torch.empty(3, self.hidden_dim, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the maps as ``nn.Linear`` does."""
        bound = self.dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def weights(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the weights (..., 2) of p and q, in float32 at least."""
        return self._attention(p, q)[0]

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the mixture (..., k) of both, in the dtype of ``q``.

        Raises:
            ValueError: ``p`` and ``q`` are not of one shape, or have other features.
        """
        weights, values = self._attention(p, q)
        return (weights.unsqueeze(-1) * values).sum(-2).to(values.dtype)

    def gate_values(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the weight (...) of what is transferred."""
        return self.weights(p, q)[..., 0]

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, hidden_dim={self.hidden_dim}"

    def _attention(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (..., 2) and the values (..., 2, k)."""
        if p.shape != q.shape or q.shape[-1:] != (self.dim,):
            raise ValueError(
                f"p {tuple(p.shape)} and q {tuple(q.shape)} must be of one shape that ends in the"
                f" {self.dim} features of the gate"
            )
        bias = None if self.bias is None else self.bias.flatten()
        maps = F.linear(torch.stack([p, q], -2), self.weight.flatten(0, 1), bias)
        key, query, value = maps.view(*maps.shape[:-1], 3, self.hidden_dim).unbind(-2)
        scores = (key * query).sum(-1, dtype=torch.promote_types(key.dtype, torch.float32))
        return (scores * self.hidden_dim**-0.5).softmax(-1), value
