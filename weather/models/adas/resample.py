"""Halve and double the horizontal resolution of tokens; levels stay."""

import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.attention.constants import INIT_STD


class Downsample(nn.Module):
    """Merge 2 x 2 neighbors into one token of twice the features (Swin patch merging).

    Odd extents are padded with zeros at the bottom and the right.

    Args:
        dim: Features d of an input token.

    Shape:
        (B, d, D, H, W) to (B, 2d, D, ceil(H/2), ceil(W/2)), channels-last strides.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.linear = nn.Linear(4 * dim, 2 * dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return the coarser tokens; neighbors are joined row by row."""
        x = x.movedim(1, -1)
        if x.shape[2] % 2 or x.shape[3] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        batch, levels, rows, columns, dim = x.shape
        x = x.reshape(batch, levels, rows // 2, 2, columns // 2, 2, dim).transpose(3, 4)
        merged: Tensor = self.linear(self.norm(x.flatten(4)))
        return merged.movedim(-1, 1)


class Upsample(nn.Module):
    """Split a token into 2 x 2 of half the features.

    Args:
        dim: Features d of an input token, even.

    Shape:
        (B, d, D, H, W) to (B, d/2, D, 2H, 2W), channels-last strides.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, 2 * dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return the finer tokens."""
        batch, dim, levels, rows, columns = x.shape
        x = self.linear(self.norm(x.movedim(1, -1)))
        x = x.view(batch, levels, rows, columns, 2, 2, dim // 2).transpose(3, 4)
        return x.reshape(batch, levels, 2 * rows, 2 * columns, dim // 2).movedim(-1, 1)
