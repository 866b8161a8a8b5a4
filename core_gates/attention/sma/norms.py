"""Norms of token sequences that PyTorch lacks: one scale for all features, and over a batch."""

import torch
from torch import Tensor, nn

from core_gates.numerics import accumulation_dtype
from core_gates.padding import check_padding_mask


class ScaleNorm(nn.Module):
    """Divide a token by its root mean square and multiply it by one learned number.

    Nguyen & Salazar, 2019, with the mean in place of the sum of squares.

    Args:
        eps: Added to the mean square.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Shape:
        (..., D) to the same.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to one."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed tokens."""
        exact = x.to(accumulation_dtype(x))
        mean_square = exact.square().mean(-1, keepdim=True)
        return (exact * (mean_square + self.eps).rsqrt() * self.scale).to(x.dtype)


class TokenBatchNorm(nn.Module):
    """Apply a batch norm to every feature over all tokens of all sequences.

    Args:
        norm: Norm of (N, D), such as ``torch.nn.BatchNorm1d(D)`` or a synchronized one.

    Shape:
        (B, T, D) to the same.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def reset_parameters(self) -> None:
        """Reset the norm, running statistics included."""
        self.norm.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the normed tokens; padding is in no statistic and its result is 0.

        With a mask the number of tokens is read on the host, as the norm gets the tokens alone.

        Args:
            x: Tokens (B, T, D).
            padding_mask: True (B, T) at tokens to ignore.

        Raises:
            ValueError: The mask is not boolean or has another shape.
        """
        if padding_mask is None:
            normed: Tensor = self.norm(x.flatten(0, -2))
            return normed.view(x.shape)
        check_padding_mask(padding_mask, x.shape[:-1])
        normed = self.norm(x[~padding_mask])
        return normed.new_zeros(x.shape).index_put((~padding_mask,), normed)
