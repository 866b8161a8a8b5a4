"""The cosine gate."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.collectives import gathered
from core_gates.errors import check_at_least
from core_gates.numerics import (
    accumulation_dtype,
    check_padding_mask,
    linear_fp32,
    lowest_index_top_k,
)
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput

_MIN_TAU = 0.01


class CosineGate(Gate):
    """Send each token to the ``k`` experts nearest in angle (Chi et al., 2022).

    The logits are cos(P x, w_e) / τ with a projection P and a learned temperature τ of at least
    0.01; the length of neither side matters. The weights are the softmax over the k largest.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        k: Experts kept per token.
        projection_dim: Features after the projection; None leaves the projection out.
        tau: First τ.
        renormalize: Whether the weights of a token sum to 1; else they are the chosen part of
            the softmax over all experts.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and indices (..., K); probs and logits (..., E).

    Raises:
        ValueError: ``k`` is not between 1 and ``num_experts``, ``projection_dim`` is below 1 or
            ``tau`` below 0.01.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        projection_dim: int | None = 256,
        tau: float = 0.5,
        renormalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_at_least(1, projection_dim=projection_dim)
        check_at_least(_MIN_TAU, tau=tau)
        self.k = self.checked_k(k)
        self.renormalize = renormalize
        self._initial_tau = tau
        compared = dim if projection_dim is None else projection_dim
        self.projection = (
            None
            if projection_dim is None
            else nn.Parameter(torch.empty(projection_dim, dim, device=device, dtype=dtype))
        )
        self.weight = nn.Parameter(torch.empty(num_experts, compared, device=device, dtype=dtype))
        self.log_tau = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw experts from N(0, 0.02²), the projection by its fan-in; return to the first τ."""
        nn.init.normal_(self.weight, std=0.02)
        if self.projection is not None:
            nn.init.normal_(self.projection, std=self.dim**-0.5)
        nn.init.constant_(self.log_tau, math.log(self._initial_tau))

    @property
    def tau(self) -> Tensor:
        """The temperature τ, a scalar in float32 at least."""
        dtype = accumulation_dtype(self.log_tau)
        logarithm = gathered(self.log_tau).squeeze(0).to(dtype)
        return logarithm.clamp(min=math.log(_MIN_TAU)).exp()

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        if padding_mask is not None:
            check_padding_mask(padding_mask, x.shape[:-1])
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0)
        if self.projection is not None:
            x = linear_fp32(x, self.projection)
        logits = linear_fp32(_unit(x), _unit(self.weight)) / self.tau
        probs = logits.softmax(-1)
        top, indices = lowest_index_top_k(logits, self.k)
        weights = top.softmax(-1) if self.renormalize else probs.gather(-1, indices)
        return RoutingOutput(weights, indices, logits=logits, probs=probs).ignore(padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, renormalize={self.renormalize}"


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 in float32 at least; those near zero become zero, not infinite."""
    exact = accumulation_dtype(vectors)
    return F.normalize(vectors.to(exact), dim=-1, eps=1e-6)
