"""The DSelect-k gate."""

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import accumulation_dtype, check_padding_mask, ignored_as_zero, linear_fp32
from core_gates.ops.elementwise import check_gamma, smooth_step
from core_gates.routing.base import Gate
from core_gates.routing.losses import selection_entropy, sum_over_positions
from core_gates.routing.output import RoutingOutput

_MASS_EPS = 1e-6


class DSelectKGate(Gate):
    """Choose experts by ``k`` selectors over binary codes (Hazimeh et al., 2021).

    Expert e carries the binary code of e, m = ⌈log2 E⌉ bits, most significant first. A selector
    has m numbers z; with ``s = smooth_step(z)`` as the probability of a bit,

        r(e) = Π_bits (s if the bit of e is 1, else 1 - s),

    and the weights are ``Σ_j softmax(w)_j r_j(e)``. If E is not a power of two some codes belong to
    no expert, and the weights sum to less than 1 until the selectors have learned to avoid them.

    Two losses, for the training module to weigh: ``entropy`` of the selectors, mean over tokens,
    presses each towards one expert; ``lost_mass``, the sum over tokens and selectors of
    ``1 / (1e-6 + Σ_e r(e))``, presses them away from codes without an expert. It is 0 if E is a
    power of two. Static selectors count as one token.

    Args:
        dim: Features of a token.
        num_experts: Number of experts, at least 2.
        k: Number of selectors.
        gamma: Width γ of the smooth step.
        per_example: Whether z and w are linear in the token; else they are free parameters and
            all tokens are routed alike.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and probs (..., E), equal. The selectors have no common logits.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        gamma: float = 1.0,
        per_example: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_at_least(2, num_experts=num_experts)
        check_gamma(gamma)
        self.k = self.checked_k(k)
        self.gamma = gamma
        self.per_example = per_example
        self.num_bits = (num_experts - 1).bit_length()
        inputs = (dim,) if per_example else ()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.code_weight = parameter(k * self.num_bits, *inputs)
        self.code_bias = parameter(k * self.num_bits) if per_example else None
        self.selector_weight = parameter(k, *inputs)
        self.selector_bias = parameter(k) if per_example else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw codes from U(±γ/100), so that all experts are open, and selectors from U(±0.05)."""
        for parameters, bound in (
            ((self.code_weight, self.code_bias), self.gamma / 100),
            ((self.selector_weight, self.selector_bias), 0.05),
        ):
            for parameter in parameters:
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        shares, choices = self._select(x, padding_mask)
        weights = (shares.unsqueeze(-1) * choices).sum(-2)
        if not self.per_example:
            weights = weights.expand(*x.shape[:-1], -1)
            if padding_mask is not None:
                check_padding_mask(padding_mask, x.shape[:-1])
        aux = self._losses(choices, padding_mask if self.per_example else None)
        return RoutingOutput(weights, probs=weights, aux=aux).ignore(padding_mask)

    def selectors(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the weights (..., J, E) of the J = ``k`` selectors before they are summed."""
        shares, choices = self._select(x, padding_mask)
        selectors = (shares.unsqueeze(-1) * choices).expand(*x.shape[:-1], -1, -1)
        return ignored_as_zero(selectors, padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, gamma={self.gamma}"

    def _select(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weight of every selector (..., J) and its choices (..., J, E)."""
        if self.per_example:
            z = linear_fp32(x, self.code_weight, self.code_bias, padding_mask=padding_mask)
            w = linear_fp32(x, self.selector_weight, self.selector_bias, padding_mask=padding_mask)
        else:
            acc = accumulation_dtype(self.code_weight)
            z, w = self.code_weight.to(acc), self.selector_weight.to(acc)
        bits = smooth_step(z, self.gamma).view(*z.shape[:-1], self.k, self.num_bits)
        experts = torch.arange(self.num_experts, device=bits.device)
        choices = torch.ones_like(bits[..., :1])
        for place in range(self.num_bits):
            bit = bits[..., place : place + 1]
            is_set = (experts >> (self.num_bits - 1 - place)) & 1 == 1
            choices = choices * torch.where(is_set, bit, 1 - bit)
        return w.softmax(-1), choices

    def _losses(self, choices: Tensor, padding_mask: Tensor | None) -> dict[str, Tensor]:
        lost = (1 / (_MASS_EPS + choices.sum(-1))).sum(-1, keepdim=True)
        lost_mass = sum_over_positions(lost, padding_mask=padding_mask).squeeze(-1)
        if self.num_experts == 2**self.num_bits:
            lost_mass = torch.zeros_like(lost_mass)
        return {
            "entropy": selection_entropy(choices, padding_mask=padding_mask),
            "lost_mass": lost_mass,
        }
