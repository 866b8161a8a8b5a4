"""The hard concrete gate."""

import torch
from torch import Tensor

from core_gates.ops.hard_concrete import HardConcrete
from core_gates.routing.base import LinearRouter
from core_gates.routing.losses import l0_loss
from core_gates.routing.output import RoutingOutput


class HardConcreteGate(LinearRouter):
    """Open every expert independently by a stretched, clipped sigmoid (Louizos et al., 2018).

    With α = x W and uniform U, in training

        s = sigmoid((log U - log(1 - U) + α) / β),  w = clip(s (ζ - γ) + γ, 0, 1),

    which is exactly 0 or 1 with positive probability; in evaluation s = sigmoid(α). The loss ``l0``
    is the expected number of open experts of a token, Σ_e sigmoid(α - β log(-γ / ζ)).

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        beta: Temperature β of the concrete distribution.
        gamma: Lower end γ of the stretched interval, below 0.
        zeta: Upper end ζ, above 1.
        padding_in_loss: Whether ignored tokens still count in the loss.
        bias: Whether the logits α have a bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights, probs and logits (..., E). ``probs`` are those of an expert to be
        open; they do not sum to 1.

    Raises:
        ValueError: β is not positive or the interval does not contain [0, 1].
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        padding_in_loss: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        self.distribution = HardConcrete(beta, gamma, zeta)
        self.distribution.check()
        self.padding_in_loss = padding_in_loss
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`.

        Args:
            x: Routing input (..., D).
            ids: Not used.
            padding_mask: True (...) at tokens to ignore.
            noise: U in [0, 1], (..., E); drawn in training if None.
        """
        logits = self.logits(x, padding_mask)
        if noise is None and self.training:
            noise = torch.rand_like(logits)
        if noise is None:
            weights = self.distribution.deterministic(logits)
        else:
            weights = self.distribution.sample(logits, noise)
        probs = self.distribution.open_probability(logits)
        routing = RoutingOutput(weights, logits=logits, probs=probs)
        l0 = l0_loss(routing, padding_mask=padding_mask, padding_in_loss=self.padding_in_loss)
        return routing.ignore(padding_mask)._replace(aux={"l0": l0})
