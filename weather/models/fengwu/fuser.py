"""Where the modalities learn of each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weather.models.fengwu.scales import learned_vectors
from weather.models.window_blocks import WindowBlocks


class Fuser(nn.Module):
    """Windowed attention over the tokens of all modalities together.

    Modalities are stacked in depth and every window holds all of them, so that temperature may ask
    wind of the same place and of its neighbors.

    Args:
        num_modalities: G.
        dim: Features of a token.
        num_heads: Attention heads.
        window: Rows and columns of an attention window.
        depth: Number of blocks.
        drop_path: Rate of stochastic depth of the last block.
        recompute: Recompute attention branches in the backward pass instead of storing them.

    Shape:
        G volumes (B, C, 1, H, W) to as many.
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        depth: int,
        *,
        drop_path: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.modality = learned_vectors(1, dim, num_modalities, 1, 1)
        self.blocks = WindowBlocks(
            dim,
            num_heads,
            (num_modalities, *window),
            depth,
            drop_path=drop_path,
            recompute=recompute,
        )

    def forward(self, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tokens of every modality, which now depend on all of them."""
        stacked = torch.cat([volume.movedim(1, -1) for volume in tokens], dim=1).movedim(-1, 1)
        fused: Tensor = self.blocks(stacked + self.modality)
        return fused.split(1, dim=2)
