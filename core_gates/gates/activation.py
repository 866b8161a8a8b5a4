"""The activation dense-to-sparse gate."""

from typing import get_args

import torch
from torch import Tensor, nn

from core_gates.activations import GATE_ACTIVATIONS, GateActivation
from core_gates.collectives import gathered
from core_gates.errors import check_option, check_positive
from core_gates.numerics import accumulation_dtype, linear_fp32
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import Schedule, SteppedGate


class ActivationGate(SteppedGate):
    """Mix all experts with ``softmax((σ(x W) + b) / τ)`` (Nguyen et al., 2024).

    With a linear score (σ the identity) temperature and slope cannot be distinguished: only W/τ and
    b/τ matter, and estimates converge slower than any polynomial rate. A nonlinear σ before the
    temperature makes both identifiable. The temperature is state that follows a schedule, or with
    ``learn_tau`` a parameter, kept as its logarithm.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        activation: σ; ``identity`` is the plain dense-to-sparse gate.
        tau: τ, or a schedule of τ over optimizer steps; always positive.
        learn_tau: Whether τ is learned, from the value given.
        device: Device of the parameters and buffers.
        dtype: Floating dtype of the parameters; a τ that is not learned is float32 at least.

    Shape:
        ``x`` (..., D); weights, probs and logits (..., E). ``logits`` are those before division.

    Raises:
        ValueError: The activation is unknown, τ is not positive, or a schedule is to be learned.
    """

    scheduled_tau: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        activation: GateActivation = "tanh",
        tau: float | Schedule = 1.0,
        learn_tau: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, device=device)
        check_option("activation", activation, get_args(GateActivation))
        self.activation = activation
        self._schedule = tau if callable(tau) else None
        self._initial_tau = tau(0) if callable(tau) else tau
        check_positive(tau=self._initial_tau)
        if learn_tau and self._schedule is not None:
            raise ValueError("tau either follows a schedule or is learned; give a number to learn")
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.log_tau = (
            nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if learn_tau else None
        )
        exact = accumulation_dtype(self.weight)
        self.register_buffer("scheduled_tau", torch.empty((), device=device, dtype=exact))
        self.reset_parameters()

    @property
    def tau(self) -> Tensor:
        """The present temperature, with gradient if it is learned."""
        if self.log_tau is None:
            return self.scheduled_tau
        return gathered(self.log_tau).squeeze(0).to(self.scheduled_tau.dtype).exp()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), zero the bias, return to the first temperature."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.scheduled_tau.fill_(self._initial_tau)
        if self.log_tau is not None:
            with torch.no_grad():
                self.log_tau.copy_(self.scheduled_tau.log())

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        scores = linear_fp32(x, self.weight, padding_mask=padding_mask)
        logits = GATE_ACTIVATIONS[self.activation](scores) + self.bias
        probs = (logits / self.tau).softmax(-1)
        return RoutingOutput(probs, logits=logits, probs=probs).ignore(padding_mask)

    def advance(self, step: int) -> None:
        """Set the temperature after ``step`` updates."""
        if self._schedule is not None:
            self.scheduled_tau.fill_(self._schedule(step))

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, activation={self.activation!r}"
