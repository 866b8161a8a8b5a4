"""What the encoders and decoders of all modalities have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from core_gates.attention.constants import INIT_STD
from weather.models.adas.embedding import GridPatches
from weather.models.window_blocks import WindowBlocks


class Scales(NamedTuple):
    """Two scales of tokens: patches of the grid, and 2 x 2 patches of twice the features.

    Attributes:
        patches: The cut of the grid.
        dim: Features d of a token at the fine scale; 2d at the coarse one.
        depths: Blocks at the fine and at the coarse scale.
        num_heads: Attention heads at the two scales.
        window: Rows and columns of an attention window.
        recompute: Recompute attention branches in the backward pass instead of storing them.
    """

    patches: GridPatches
    dim: int
    depths: tuple[int, int]
    num_heads: tuple[int, int]
    window: tuple[int, int]
    recompute: bool

    def blocks(self, scale: int) -> WindowBlocks:
        """Return the blocks of one modality at the fine (0) or the coarse (1) scale."""
        return WindowBlocks(
            self.dim * 2**scale,
            self.num_heads[scale],
            (1, *self.window),
            self.depths[scale],
            recompute=self.recompute,
        )


def learned_vectors(*shape: int) -> nn.Parameter:
    """Return a learned tensor that is added to tokens, drawn from a narrow normal distribution."""
    vectors = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(vectors, std=INIT_STD)
    return vectors
