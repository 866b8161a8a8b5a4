"""The dense softmax gate."""

import torch
from torch import Tensor, nn

from core_gates.errors import check_positive
from core_gates.numerics import accumulation_dtype, linear_fp32
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import Schedule, SteppedGate


class SoftmaxGate(SteppedGate):
    """Mix all experts with ``softmax(x W / τ)`` (Jacobs et al., 1991).

    The temperature τ is state: with a schedule, each `update` moves it by one step.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        tau: τ, or a schedule of τ over optimizer steps; always positive.
        bias: Whether the logits have a bias.
        device: Device of the parameters and buffers.
        dtype: Floating dtype of the parameters; τ is kept in float32 at least.

    Shape:
        ``x`` (..., D); weights, probs and logits (..., E). ``logits`` are those before division.

    Raises:
        ValueError: The first temperature is not positive.
    """

    tau: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        tau: float | Schedule = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, device=device)
        self._schedule = tau if callable(tau) else None
        self._initial_tau = tau(0) if callable(tau) else tau
        check_positive(tau=self._initial_tau)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        exact = accumulation_dtype(self.weight)
        self.register_buffer("tau", torch.empty((), device=device, dtype=exact))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), zero the bias, return to the first temperature."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.tau.fill_(self._initial_tau)

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        logits = linear_fp32(x, self.weight, self.bias, padding_mask=padding_mask)
        probs = (logits / self.tau).softmax(-1)
        return RoutingOutput(probs, logits=logits, probs=probs).ignore(padding_mask)

    def advance(self, step: int) -> None:
        """Set the temperature after ``step`` updates."""
        if self._schedule is not None:
            self.tau.fill_(self._schedule(step))
