"""The noisy top-k gate."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.numerics import linear_fp32, lowest_index_top_k
from core_gates.routing.base import LinearRouter
from core_gates.routing.losses import importance_loss
from core_gates.routing.output import RoutingOutput

_MIN_STD = 0.01


class NoisyTopKGate(LinearRouter):
    """Send each token to the ``k`` experts with the largest noisy logits (Shazeer et al., 2017).

    In training ``H = x W + ε (softplus(x W_noise) + 0.01)`` with standard normal ε, else x W; the
    weights are the softmax over the k largest H. Two losses balance the experts, both squared
    coefficients of variation over experts (the paper weighs each by 0.1): ``importance``, of the
    summed weights, and ``load``, of the expected number of tokens,

        load_e = Σ_t Φ((x W - threshold) / std),

    where the threshold of e is what H must exceed: the k-th largest of the other experts. At k = E
    there is none, and every load is the number of tokens. Without noise the load is the plain
    count, which has no gradient.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        k: Experts kept per token.
        padding_in_loss: Whether ignored tokens still count in the losses.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and indices (..., K); probs and logits (..., E). ``probs`` is the
        softmax over all H, ``logits`` is without noise.

    Raises:
        ValueError: ``k`` is not between 1 and ``num_experts``.
    """

    renormalize = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        padding_in_loss: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, device=device, dtype=dtype)
        self.k = self.checked_k(k)
        self.padding_in_loss = padding_in_loss
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero both weights: the noise alone chooses at first, so that experts start balanced."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

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
            noise: ε (..., E); drawn in training if None.
        """
        clean = self.logits(x, padding_mask)
        if noise is None and self.training:
            noise = torch.randn_like(clean)
        noisy, std = clean, None
        if noise is not None:
            raw = linear_fp32(x, self.noise_weight, padding_mask=padding_mask)
            std = F.softplus(raw) + _MIN_STD
            noisy = clean + noise * std
        top, indices = lowest_index_top_k(noisy, min(self.k + 1, self.num_experts))
        weights, chosen = top[..., : self.k].softmax(-1), indices[..., : self.k]
        routing = RoutingOutput(weights, chosen, logits=clean, probs=noisy.softmax(-1))
        aux = {
            name: importance_loss(
                totaled, padding_mask=padding_mask, padding_in_loss=self.padding_in_loss
            )
            for name, totaled in (
                ("importance", routing),
                ("load", RoutingOutput(self._load(routing, top, std))),
            )
        }
        return routing.ignore(padding_mask)._replace(aux=aux)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}"

    def _load(self, routing: RoutingOutput, top: Tensor, std: Tensor | None) -> Tensor:
        """Return the probability (..., E) that a new draw of its noise would keep an expert."""
        chosen = routing.chosen(self.num_experts)
        if std is None or routing.logits is None or self.k == self.num_experts:
            return chosen
        threshold = torch.where(chosen > 0, top[..., self.k, None], top[..., self.k - 1, None])
        return cast(Tensor, torch.special.ndtr((routing.logits - threshold) / std))
