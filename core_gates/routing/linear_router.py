"""Gates whose logits are one linear map of a token."""

import torch
from torch import Tensor, nn

from core_gates.numerics import linear_fp32
from core_gates.routing.base import Gate


class LinearRouter(Gate):
    """Base of gates with the logits x Wᵀ + b, in float32 or wider.

    A subclass calls :meth:`reset_parameters` once all that it resets exists.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        bias: Whether the logits have a bias.
        summary_size: Integers that :meth:`~core_gates.routing.base.Gate.summary` returns, if any.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bias: bool = False,
        summary_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, summary_size=summary_size, device=device)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), so that scores start near uniform; zero the bias."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the logits (..., E) of tokens (..., D); ignored tokens count as finite."""
        return linear_fp32(x, self.weight, self.bias, padding_mask=padding_mask)
