"""The top-k gate."""

import torch
from torch import Tensor

from core_gates.ops.router.op import router
from core_gates.routing.base import LinearRouter
from core_gates.routing.output import RoutingOutput


class TopKGate(LinearRouter):
    """Send each token to the ``k`` experts with the largest logits (Shazeer et al., 2017).

    The weights are the softmax over the chosen logits, which equals the softmax over all of them
    scaled to sum 1 (Mixtral); with ``renormalize=False`` they are the plain softmax over all
    logits, whose chosen part sums to less (Switch, Qwen). Equal logits go to the lowest index.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        k: Experts kept per token.
        renormalize: Whether the weights of a token sum to 1.
        bias: Whether the logits have a bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and indices (..., K); probs and logits (..., E).

    Raises:
        ValueError: ``k`` is not between 1 and ``num_experts``.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        renormalize: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        self.k = self.checked_k(k)
        self.renormalize = renormalize
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        logits = self.logits(x, padding_mask)
        weights, indices, probs, *_ = router(logits, self.k, renormalize=self.renormalize)
        return RoutingOutput(weights, indices, logits=logits, probs=probs).ignore(padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, renormalize={self.renormalize}"
