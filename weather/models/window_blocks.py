"""Windowed self-attention, one block after another, over a volume of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core_gates.attention import SwinBlock, WindowLayout


class WindowBlocks(nn.ModuleList):
    """Blocks of self-attention within windows; every second one has its windows shifted.

    Args:
        dim: Features d of a token.
        num_heads: Attention heads.
        window: Extents of a window in depth, latitude, longitude.
        depth: Number of blocks.
        drop_path: Rate of stochastic depth of the last block, to which it grows linearly from 0.
        options: Of every block, see `core_gates.attention.SwinBlock`.

    Shape:
        (B, d, D, H, W) to the same, channels-last strides.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int, int],
        depth: int,
        *,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        super().__init__(
            SwinBlock(dim, num_heads, window, cross=False, drop_path=rate, **options)
            for rate in rates
        )
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after all blocks."""
        size = (x.shape[2], x.shape[3], x.shape[4])
        for index, block in enumerate(self):
            layout = WindowLayout.of(size, self.window, shifted=bool(index % 2))
            x = layout.reverse(block(layout.partition(x), None, layout))
        return x
