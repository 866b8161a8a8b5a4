"""The low-rank feature gate of HoME."""

from typing import Literal

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import linear_fp32


class LowRankFeatureGate(nn.Module):
    """Rescale every feature by a factor in (0, 2) that depends on the input (arXiv 2408.05430).

    ``y = v * F(v)`` with ``F(v) = Σ_l softmax(v W + b)_l 2σ(v B_l A_l)`` over L maps of rank r. As
    the mixture sums to one, this is ``1 + Σ_l softmax(v W + b)_l tanh(v B_l A_l / 2)``, the form
    used here: with A = 0, the start, the factor is exactly one.

    Args:
        dim: Number of features D.
        rank: Rank of each map, or ``paper`` for dim / num_maps, which costs 2 dim² weights.
        num_maps: Number L of maps.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; mixture and factor are computed in float32.

    Shape:
        ``v`` and the result (..., D).

    Raises:
        ValueError: A size is below 1, or the rank of the paper is not an integer.
    """

    def __init__(
        self,
        dim: int,
        rank: int | Literal["paper"] = 16,
        *,
        num_maps: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_maps=num_maps)
        if rank == "paper":
            if dim % num_maps:
                raise ValueError(
                    f"the rank of the paper is dim / num_maps, but {num_maps} does not divide"
                    f" {dim}; give the rank as an integer"
                )
            rank = dim // num_maps
        check_at_least(1, rank=rank)
        self.dim, self.rank, self.num_maps = dim, rank, num_maps

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.mixer_weight = parameter(num_maps, dim)
        self.mixer_bias = parameter(num_maps)
        self.down = parameter(num_maps, dim, rank)
        self.up = parameter(num_maps, rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a factor of one and a mixture near uniform: A = 0, B from N(0, 1/dim)."""
        nn.init.normal_(self.mixer_weight, std=0.02)
        nn.init.zeros_(self.mixer_bias)
        nn.init.normal_(self.down, std=self.dim**-0.5)
        nn.init.zeros_(self.up)

    def factors(self, v: Tensor) -> Tensor:
        """Return the factors (..., D) in (0, 2), in float32 at least.

        Raises:
            ValueError: ``v`` has another number of features.
        """
        mixture = linear_fp32(v, self.mixer_weight, self.mixer_bias).softmax(-1)
        rows = v.reshape(-1, self.dim)
        hidden = rows @ self.down.permute(1, 0, 2).flatten(1)  # all maps in one matmul
        hidden = hidden.view(-1, self.num_maps, self.rank).transpose(0, 1)
        logits = (hidden @ self.up).to(mixture.dtype)
        mixture = mixture.reshape(-1, self.num_maps).mT.unsqueeze(-1)
        return (1 + (mixture * (logits / 2).tanh()).sum(0)).view(v.shape)

    def forward(self, v: Tensor) -> Tensor:
        """Return ``v`` times its factors, in the dtype of ``v``.

        Raises:
            ValueError: ``v`` has another number of features.
        """
        return (v * self.factors(v)).to(v.dtype)

    def gate_values(self, v: Tensor) -> Tensor:
        """Return half the factors (..., D), between 0 and 1."""
        return self.factors(v) / 2

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, rank={self.rank}, num_maps={self.num_maps}"
