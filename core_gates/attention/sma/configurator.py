"""The latent configurator: which tokens use a module, and with what weight."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_positive
from core_gates.numerics import linear_fp32
from core_gates.padding import check_padding_mask


class TokenActivation(NamedTuple):
    """What a configurator decides for every token.

    Attributes:
        mask: True where the module runs (B, T).
        confidence: Probability of running, at least 1/2, where it runs, else exactly 0 (B, T);
            float32 at least. The only way back for gradients.
    """

    mask: Tensor
    confidence: Tensor


class SparseModularActivation(nn.Module):
    """Decide token by token whether a module runs (Ren et al., 2023, arXiv 2306.11197).

    ``P = softmax((x W + b) / τ)`` over {off, on} with a learned temperature ``τ = exp(θ)``. The
    module runs where *on* is more probable, and its result is multiplied by that probability, the
    confidence. No noise is drawn. A tie is off.

    Args:
        dim: Features D of a token.
        tau_scale: s of the first temperature ``s √D``.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the decision is computed in float32 at least.

    Shape:
        ``x`` (B, T, D), or with any other leading shape; results have the leading shape.

    Raises:
        ValueError: ``dim`` is below 1 or the scale is not positive.
    """

    def __init__(
        self,
        dim: int,
        *,
        tau_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        check_positive(tau_scale=tau_scale)
        self.dim = dim
        self.tau_scale = tau_scale
        self.weight = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.log_tau = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), zero the bias, and set the first temperature."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.log_tau, math.log(self.tau_scale * math.sqrt(self.dim)))

    def logits(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return ``(x W + b) / τ`` (..., 2) for off and on."""
        scores = linear_fp32(x, self.weight, self.bias, padding_mask=padding_mask)
        return scores / self.log_tau.to(scores.dtype).exp()

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> TokenActivation:
        """Decide for every token; the module never runs where ``padding_mask`` (...) is True.

        Raises:
            ValueError: ``x`` or the mask has another shape.
        """
        logits = self.logits(x, padding_mask=padding_mask)
        mask = logits[..., 1] > logits[..., 0]
        if padding_mask is not None:
            mask = mask & ~padding_mask
        return TokenActivation(mask, logits.softmax(-1)[..., 1].masked_fill(~mask, 0))

    def gate_values(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the confidences, exactly 0 where the module does not run, without padding."""
        confidence: Tensor = self(x, padding_mask=padding_mask).confidence
        if padding_mask is None:
            return confidence
        check_padding_mask(padding_mask, confidence.shape)
        return confidence[~padding_mask]

    def extra_repr(self) -> str:
        """Show the sizes in ``print(configurator)``."""
        return f"dim={self.dim}"
