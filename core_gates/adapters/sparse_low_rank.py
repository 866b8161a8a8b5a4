"""SoRA: a low-rank adapter whose rank is learned by a sparse gate."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters.low_rank import LowRank
from core_gates.adapters.soft_threshold import GateInitialization, SoftThreshold
from core_gates.errors import check_at_least, check_fraction
from core_gates.numerics import accumulation_dtype, unrounded


class SparseLowRank(nn.Module):
    """Return ``α/R B (g ∘ A x)``, to be added to a layer's output (Ding et al., 2023, SoRA).

    Components whose gate is zero contribute nothing: :meth:`prune_` cuts them,
    :meth:`export` gives the rest as a plain LoRA, :meth:`merge_into` adds it to a weight. All three
    are exact. The scale stays that of the first rank and is part of the state, so that a pruned
    adapter can be loaded: into one of any rank, which then takes that of the checkpoint. Load
    before making an optimizer, whose parameters are those of the former rank.

    Args:
        in_features: Inputs of the layer.
        out_features: Outputs of the layer.
        rank: Largest rank R; 0 for an adapter that is loaded or was pruned away.
        alpha: Numerator α of the scale.
        dropout: Probability of dropping an input feature, of the adapter only.
        initialization: That of the gate; see :class:`SoftThreshold`.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the gate is float32 at least.

    Shape:
        ``x`` (..., D) to (..., D'); ``lora_A`` (R, D), ``lora_B`` (D', R), gate (R,).

    Raises:
        ValueError: A size is below 1, ``rank`` is negative, or ``dropout`` is not a probability.
    """

    scaling: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, out_features=out_features)
        check_fraction(dropout=dropout)
        self.in_features = in_features
        self.out_features = out_features
        self.dropout = dropout
        self._start = alpha, max(rank, 1)
        self.lora_gate = SoftThreshold(
            rank, initialization=initialization, device=device, dtype=dtype
        )
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        # α and R: both are exact in float32, their ratio is not.
        self.register_buffer("scaling", torch.empty(2, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from Kaiming's uniform distribution (a = √5), zero B, draw the gate."""
        self.scaling.copy_(torch.tensor(self._start))
        if len(self.lora_A):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.lora_gate.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the layer's output."""
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return F.linear(self.scale.to(hidden.dtype) * self.lora_gate(hidden), self.lora_B)

    def gate_values(self, x: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the gate (R,), which no input changes."""
        return self.lora_gate.gate_values()

    @property
    def scale(self) -> Tensor:
        """Scale α/R with the rank R of the start, in float32 at least."""
        exact = accumulation_dtype(self.lora_B)
        alpha, rank = self.scaling.to(exact).unbind()
        return alpha / rank

    @property
    def rank(self) -> int:
        """Number of components whose gate is not zero; reading it waits for the device."""
        return int(self.lora_gate.kept.sum())

    @property
    def num_retained(self) -> int:
        """Parameters of the exported adapter."""
        return self.rank * (self.in_features + self.out_features)

    @torch.no_grad()
    def export(self) -> LowRank:
        """Return the remaining components as a plain LoRA of scale 1, the gate folded into B.

        Its rank is 0 if nothing remains. Files of LoRAs know no rank 0: leave such a layer out.
        """
        kept = self.lora_gate.kept
        factors = self.scale * self.lora_gate.weight[kept]
        up = (factors * self.lora_B[:, kept]).to(self.lora_B.dtype)
        return LowRank(self.lora_A[kept].clone(), up)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the layer's weight (D', D)."""
        return self.export().delta_weight()

    @torch.no_grad()
    def merge_into(self, linear: nn.Linear) -> None:
        """Add the adapter to the weight of a layer in place; dead components change no bit of it.

        Raises:
            ValueError: The layer has other sizes.
        """
        exported = self.export()
        exported.check(linear.in_features, linear.out_features)
        if exported.rank:
            linear.weight += exported.delta_weight().to(linear.weight.dtype)

    @torch.no_grad()
    def prune_(self, threshold: float = 0.0) -> int:
        """Cut the components whose gate is at most ``threshold`` in magnitude, down to rank 0.

        With the threshold 0 the output stays the same. The parameters become new ones without
        gradient history: make a new optimizer if training continues.

        Args:
            threshold: Largest magnitude of a gate that is cut.

        Returns:
            Number of components that remain.
        """
        gate = self.lora_gate.weight
        kept = ~(gate.abs() <= threshold)  # a NaN stays, to be seen
        self._replace(self.lora_A[kept], self.lora_B[:, kept], gate[kept])
        return len(self.lora_gate.weight)

    def _replace(self, down: Tensor, up: Tensor, gate: Tensor) -> None:
        self.lora_A = nn.Parameter(down, self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(up, self.lora_B.requires_grad)
        self.lora_gate.weight = nn.Parameter(gate, self.lora_gate.weight.requires_grad)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(adapter)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}lora_A")
        if isinstance(saved, Tensor) and saved.ndim == 2 and len(saved) != len(self.lora_A):
            rank = len(saved)
            up = self.lora_B.new_empty(self.out_features, rank)
            gate = self.lora_gate.weight.new_empty(rank)
            self._replace(self.lora_A.new_empty(rank, self.in_features), up, gate)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            return (unrounded(fn) if tensor is self.scaling else fn)(tensor)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return,no-untyped-call]
