"""Gates of features with low-rank logits, in groups (HoME), and their rectifiers."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import autocast_off
from core_gates.ops.feature_gate import reference
from core_gates.ops.feature_gate.op import feature_gate
from core_gates.ops.hard_concrete import HardConcrete

Rectifier = Literal["sigmoid", "relu", "hard_concrete", "straight_through"]

HARD_CONCRETE = HardConcrete()


def rectify(logits: Tensor, rectifier: Rectifier) -> Tensor:
    """Return the deterministic scores of gates, not negative, in the shape of ``logits``."""
    if rectifier == "relu":
        return logits.relu()
    if rectifier == "hard_concrete":
        return HARD_CONCRETE.deterministic(logits)
    open_ = logits.sigmoid()
    if rectifier == "straight_through":
        return (open_ > 0.5).to(open_.dtype) + (open_ - open_.detach())
    return open_


Rank = int | Literal["paper"]


class LowRankFeatureGates(nn.Module):
    """G feature gates that read one input, or several (arXiv 2408.05430).

    Gate g rescales every feature by a factor in (0, 2) that depends on the input:
    ``y_g = v * F_g(v)`` with ``F_g(v) = Σ_l softmax(v W_g + b_g)_l 2σ(v B_gl A_gl)`` over L maps of
    rank r. As the mixture sums to one, this is ``1 + Σ_l softmax(v W_g + b_g)_l (2σ(·) - 1)``, the
    form used here: with A = 0, the start, the factor is exactly one. The mixers and first maps of
    all gates of an input are one matmul.

    Args:
        dim: Number of features D.
        num_gates: Number of gates G.
        rank: Rank of each map, or ``paper`` for dim / num_maps, which costs 2 dim² weights a gate.
        num_maps: Number L of maps.
        reads: For every gate the inputs that it reads, in ascending order; gates that read several
            have several results, next to each other. None for a single input that all read.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; mixture and factor are computed in float32.

    Attributes:
        inputs: Input of every result.
        gates: Gate of every result.

    Shape:
        ``v`` (N, D) to (N, G, D). With ``reads`` ``v`` is (N, I, D) and the result (N, R, D), where
        R counts the inputs of all gates. In memory the rows of a gate are adjacent.

    Raises:
        ValueError: A size is below 1, the rank of the paper is not an integer, or ``reads`` has
            another number of gates.
    """

    def __init__(
        self,
        dim: int,
        num_gates: int,
        rank: Rank = 16,
        *,
        num_maps: int = 2,
        reads: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_gates=num_gates)
        self.dim, self.num_gates, self.num_maps = dim, num_gates, num_maps
        self.rank = rank = rank_of(rank, dim, num_maps)
        if reads is not None and (len(reads) != num_gates or not all(reads)):
            raise ValueError(
                f"reads must name the inputs of each of {num_gates} gates, got {list(reads)}"
            )
        self.reads = None if reads is None else tuple(map(tuple, reads))
        pairs = [(g, i) for g in range(num_gates) for i in (reads[g] if reads else (0,))]
        self.gates, self.inputs = (tuple(column) for column in zip(*pairs, strict=True))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_gates, *shape, device=device, dtype=dtype))

        self.mixer_weight = parameter(num_maps, dim)
        self.mixer_bias = parameter(num_maps)
        self.down = parameter(num_maps, rank, dim)
        self.up = parameter(num_maps, rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a factor of one and a mixture near uniform: A = 0, B from N(0, 1/dim)."""
        nn.init.normal_(self.mixer_weight, std=0.02)
        nn.init.zeros_(self.mixer_bias)
        nn.init.normal_(self.down, std=self.dim**-0.5)
        nn.init.zeros_(self.up)

    def factors(self, v: Tensor) -> Tensor:
        """Return the factors (N, R, D) in (0, 2), in float32 at least.

        Raises:
            ValueError: ``v`` has another shape.
        """
        with autocast_off(v):
            stacked = reference.factors(self._stacked(v), *self._maps(), self.inputs, self.gates)
        return stacked.transpose(0, 1)

    def forward(self, v: Tensor) -> Tensor:
        """Return ``v`` times the factors of every gate (N, R, D), in the dtype of ``v``.

        Raises:
            ValueError: ``v`` has another shape.
        """
        out = feature_gate(self._stacked(v), *self._maps(), self.inputs, self.gates)
        return out.transpose(0, 1)

    def gate_values(self, v: Tensor) -> Tensor:
        """Return half the factors (N, R, D), between 0 and 1."""
        return self.factors(v) / 2

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gates)``."""
        return (
            f"dim={self.dim}, num_gates={self.num_gates}, rank={self.rank},"
            f" num_maps={self.num_maps}"
        )

    def _stacked(self, v: Tensor) -> Tensor:
        """Return the inputs (I, N, D)."""
        number = max(self.inputs) + 1
        shape = (self.dim,) if self.reads is None else (number, self.dim)
        if v.ndim != len(shape) + 1 or v.shape[1:] != shape:
            raise ValueError(f"v {tuple(v.shape)} must be (N, {', '.join(map(str, shape))})")
        return v.unsqueeze(0) if self.reads is None else v.transpose(0, 1)

    def _maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mixer_weight, self.mixer_bias, self.down, self.up


class LowRankFeatureGate(nn.Module):
    """Rescale every feature by a factor in (0, 2) that depends on the input (arXiv 2408.05430).

    ``y = v * F(v)`` with ``F(v) = Σ_l softmax(v W + b)_l 2σ(v B_l A_l)`` over L maps of rank r, a
    single one of `LowRankFeatureGates`.

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
        rank: Rank = 16,
        *,
        num_maps: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.rank, self.num_maps = dim, rank_of(rank, dim, num_maps), num_maps

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.mixer_weight = parameter(num_maps, dim)
        self.mixer_bias = parameter(num_maps)
        self.down = parameter(num_maps, dim, self.rank)
        self.up = parameter(num_maps, self.rank, dim)
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
        with autocast_off(v):
            return reference.factors(self._rows(v), *self._maps(), [0], [0]).view(v.shape)

    def forward(self, v: Tensor) -> Tensor:
        """Return ``v`` times its factors, in the dtype of ``v``.

        Raises:
            ValueError: ``v`` has another number of features.
        """
        return feature_gate(self._rows(v), *self._maps(), [0], [0]).view(v.shape)

    def gate_values(self, v: Tensor) -> Tensor:
        """Return half the factors (..., D), between 0 and 1."""
        return self.factors(v) / 2

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, rank={self.rank}, num_maps={self.num_maps}"

    def _rows(self, v: Tensor) -> Tensor:
        """Return the input (1, N, D)."""
        if v.shape[-1:] != (self.dim,):
            raise ValueError(f"v {tuple(v.shape)} must end in the {self.dim} features of a gate")
        return v.reshape(1, -1, self.dim)

    def _maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = self.mixer_weight, self.mixer_bias, self.down.mT, self.up
        mixer, bias, down, up = (part.unsqueeze(0) for part in parts)
        return mixer, bias, down, up


def rank_of(rank: Rank, dim: int, num_maps: int) -> int:
    """Return the rank of a feature gate as a number.

    Raises:
        ValueError: A size is below 1, or the rank of the paper is not an integer.
    """
    check_at_least(1, dim=dim, num_maps=num_maps)
    if rank == "paper":
        if dim % num_maps:
            raise ValueError(
                f"the rank of the paper is dim / num_maps, but {num_maps} does not divide {dim};"
                " give the rank as an integer"
            )
        return dim // num_maps
    check_at_least(1, rank=rank)
    return rank
