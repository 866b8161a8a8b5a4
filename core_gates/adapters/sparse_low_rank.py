"""SoRA: a low-rank adapter whose rank is learned by a sparse gate."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters.low_rank import LowRank
from core_gates.adapters.soft_threshold import GateInitialization, SoftThreshold


class SparseLowRank(nn.Module):
    """Return ``α/r_max B (g ∘ A x)``, to be added to a layer's output (Ding et al., 2023, SoRA).

    Components whose gate is zero contribute nothing: :meth:`prune_` cuts them,
    :meth:`export` gives the rest as a plain LoRA, :meth:`merge_into` adds it to a weight. All three
    are exact. The scale stays that of the first rank.

    Args:
        in_features: Inputs of the layer.
        out_features: Outputs of the layer.
        r: Largest rank.
        alpha: Numerator of the scale.
        dropout: Probability of dropping an input feature, of the adapter only.
        initialization: That of the gate; see :class:`SoftThreshold`.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D) to (..., D'); ``lora_A`` (R, D), ``lora_B`` (D', R), gate (R,).

    Raises:
        ValueError: A size is below 1, or ``dropout`` is no probability.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, got {dropout}")
        self.in_features = in_features
        self.out_features = out_features
        self.dropout = dropout
        self.lora_gate = SoftThreshold(r, initialization=initialization, device=device, dtype=dtype)
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from Kaiming's uniform distribution (a = √5), zero B, draw the gate."""
        if len(self.lora_A):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.lora_gate.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the layer's output."""
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return F.linear(self.scale * self.lora_gate(hidden), self.lora_B)

    def gate_values(self, x: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the gate (R,), which no input changes."""
        return self.lora_gate.gate_values()

    @property
    def rank(self) -> int:
        """Number of components whose gate is not zero; reading it waits for the device."""
        return int(self.lora_gate.kept.sum())

    @property
    def num_retained(self) -> int:
        """Parameters of the exported adapter."""
        return self.rank * (self.in_features + self.out_features)

    @torch.no_grad()
    def export(self) -> LowRank | None:
        """Return the remaining components as a plain LoRA of scale 1, the gate folded into B.

        None if nothing remains: formats for LoRA know no rank 0, so such a layer is left out.
        """
        kept = self.lora_gate.kept
        if not kept.any():
            return None
        up = self.scale * self.lora_B[:, kept] * self.lora_gate.weight[kept].to(self.lora_B.dtype)
        return LowRank(self.lora_A[kept].clone(), up)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the layer's weight (D', D)."""
        exported = self.export()
        if exported is None:
            return self.lora_A.new_zeros(self.out_features, self.in_features)
        return exported.delta_weight()

    @torch.no_grad()
    def merge_into(self, linear: nn.Linear) -> None:
        """Add the adapter to the weight of a layer in place; dead components change no bit of it.

        Raises:
            ValueError: The layer has other sizes.
        """
        exported = self.export()
        if exported is None:
            exported = LowRank(self.lora_A[:0], self.lora_B[:, :0])
        exported.check(linear.in_features, linear.out_features)
        if exported.rank:
            linear.weight += exported.delta_weight().to(linear.weight.dtype)

    @torch.no_grad()
    def prune_(self, threshold: float = 0.0) -> int:
        """Cut the components whose gate is at most ``threshold`` in magnitude, down to rank 0.

        With the threshold 0 the output stays the same. The parameters become new ones without
        gradient history: make a new optimizer if training goes on.

        Args:
            threshold: Largest magnitude of a gate that is cut.

        Returns:
            Number of components that remain.
        """
        gate = self.lora_gate.weight
        kept = ~(gate.abs() <= threshold)  # a NaN stays, to be seen
        self.lora_A = nn.Parameter(self.lora_A[kept], self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(self.lora_B[:, kept], self.lora_B.requires_grad)
        self.lora_gate.weight = nn.Parameter(gate[kept], gate.requires_grad)
        return len(self.lora_gate.weight)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(adapter)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
