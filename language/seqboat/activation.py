"""Rules that stand in for the learned gate of a layer: all tokens, none, or random ones."""

from typing import Self

import torch
from torch import Tensor, nn

from core_gates.attention.sma import TokenActivation
from core_gates.errors import check_at_least


class RuleActivation(nn.Module):
    """Activate a fixed fraction of the tokens, with confidence 1.

    Tokens are drawn for every sequence; single tokens have none. In evaluation the same batches in
    the same order get the same draws, from each time on that evaluation mode is set.

    Args:
        density: Fraction of the tokens; 1 for all, 0 for none.
        layer: Number of the layer, each of which draws others in evaluation.

    Raises:
        ValueError: ``density`` is not between 0 and 1.
    """

    def __init__(self, density: float, layer: int = 0) -> None:
        super().__init__()
        check_at_least(0, density=density)
        if density > 1:
            raise ValueError(f"density must be at most 1, got {density}")
        self.density, self.layer, self._batches = density, layer, 0

    def train(self, mode: bool = True) -> Self:
        """Choose training or evaluation, whose draws then begin again."""
        self._batches = 0
        return super().train(mode)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> TokenActivation:
        """Decide for tokens ``x`` (B, T, D), never for padding (B, T).

        Raises:
            ValueError: Random tokens are to be drawn of single tokens (B, D).
        """
        if x.dim() < 3 and 0 < self.density < 1:
            raise ValueError("random activation needs whole sequences: give densities of 0 or 1")
        if self.training:
            drawn = torch.rand(x.shape[:-1], device=x.device)
        else:
            draws = torch.Generator().manual_seed(self.layer + 1000 * self._batches)
            drawn = torch.rand(x.shape[:-1], generator=draws).to(x.device)
            self._batches += 1
        mask = drawn < self.density
        if padding_mask is not None:
            mask = mask & ~padding_mask
        return TokenActivation(mask, mask.to(torch.float32))

    def extra_repr(self) -> str:
        """Show the density in ``print(activation)``."""
        return f"density={self.density}"
