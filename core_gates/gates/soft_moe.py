"""The Soft-MoE gate."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_positive
from core_gates.numerics import accumulation_dtype, check_padding_mask, linear_fp32
from core_gates.routing.base import Gate
from core_gates.routing.output import RoutingOutput

_EPS = 1e-6


class SoftMoEGate(Gate):
    """Give the experts slots, each a mixture of all tokens (Puigcerver et al., 2024).

    The logits of T tokens and E S slots are ``unit(x) (scale unit(Φ))``, where ``unit(v)`` is
    ``v / sqrt(‖v‖² + 1e-6)``. A slot is the mixture of the tokens by the softmax over the
    tokens; a token receives the results of all slots, mixed by the softmax over the slots.
    Everything is smooth, nothing is dropped, and the cost is that of E S tokens; with S = T / E
    slots it is that of one expert per token.

    Every token takes part in every slot: a causal model must not use this gate.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        num_slots: Slots S of an expert.
        initial_scale: First scale, which bounds the logits. With 1 every slot begins near the mean
            of all tokens; a training of few steps, which move the scale little, wants more.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., T, D); dispatch and weights (..., T, E, S); probs and logits (..., T, E), those
        of the slots of an expert taken together.

    Raises:
        ValueError: ``num_slots`` is below 1, or the scale not positive.
    """

    couples_tokens = True
    group_dim: ClassVar[int] = -2

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_slots: int = 1,
        initial_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_at_least(1, num_slots=num_slots)
        check_positive(initial_scale=initial_scale)
        self.num_slots, self.initial_scale = num_slots, initial_scale
        self.weight = nn.Parameter(
            torch.empty(num_experts * num_slots, dim, device=device, dtype=dtype)
        )
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the slots with expected length 1, and return to the first scale."""
        nn.init.normal_(self.weight, std=self.dim**-0.5)
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`.

        Raises:
            ValueError: ``x`` is a single token, or the mask does not fit.
        """
        if x.ndim < 2:
            raise ValueError(f"x {tuple(x.shape)} must be (..., T, D): slots mix tokens")
        ignored = None
        if padding_mask is not None:
            check_padding_mask(padding_mask, x.shape[:-1])
            ignored = padding_mask.unsqueeze(-1)
            x = x.masked_fill(ignored, 0)
        logits = self.scale * linear_fp32(_unit(x), _unit(self.weight))
        over_positions, weights = logits, logits.softmax(-1)
        if ignored is not None:
            over_positions = logits.masked_fill(ignored, torch.finfo(logits.dtype).min)
            weights = weights.masked_fill(ignored, 0)
        dispatch = over_positions.softmax(-2)
        if ignored is not None:
            dispatch = dispatch.masked_fill(ignored, 0)  # where all tokens are ignored
        slots = (*x.shape[:-1], self.num_experts, self.num_slots)
        by_expert = logits.view(slots).logsumexp(-1)
        return RoutingOutput(
            weights.view(slots),
            logits=by_expert,
            probs=by_expert.softmax(-1),
            dispatch=dispatch.view(slots),
        )

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, num_slots={self.num_slots}"


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.to(accumulation_dtype(vectors))
    return vectors * (vectors.square().sum(-1, keepdim=True) + _EPS).rsqrt()
