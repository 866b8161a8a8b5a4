"""A linear layer with a SoRA adapter next to it."""

import torch
from torch import Tensor, nn

from core_gates.adapters.soft_threshold import GateInitialization
from core_gates.adapters.sparse_low_rank import SparseLowRank


class SparseLoraLinear(nn.Module):
    """Add a :class:`SparseLowRank` adapter to the output of a linear layer (Ding et al., 2023).

    The layer is neither changed nor frozen: ``layer.base`` gives it back with the same bits, and
    :meth:`merge` with the adapter added to its weight. At the start the output is that of the
    layer.

    Args:
        base: The layer.
        rank: Largest rank R.
        alpha: Numerator α of the scale α/R.
        dropout: Probability of dropping an input feature, of the adapter only.
        initialization: That of the gate; see :class:`SoftThreshold`.
        device: Device of the adapter, by default that of the layer.
        dtype: Floating dtype of the adapter, by default that of the layer if it is floating.

    Shape:
        ``x`` (..., D) to (..., D').
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        floating = base.weight.dtype if base.weight.is_floating_point() else None
        self.base = base
        self.adapter = SparseLowRank(
            base.in_features,
            base.out_features,
            rank,
            alpha=alpha,
            dropout=dropout,
            initialization=initialization,
            device=device or base.weight.device,
            dtype=dtype or floating,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer plus that of the adapter."""
        base: Tensor = self.base(x)
        added: Tensor = self.adapter(x)
        return base + added

    def merge(self) -> nn.Linear:
        """Add the adapter to the weight of the layer in place, close it, and return the layer."""
        base: nn.Linear = self.base
        self.adapter.merge_into(base)
        nn.init.zeros_(self.adapter.lora_gate.weight)
        return base
