"""From channels on the grid to tokens on levels, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_channels(num_surface: int, num_upper: int, num_levels: int) -> None:
    """Refuse numbers of channels that no state has.

    Raises:
        ValueError: There is no channel, or there are upper variables without levels, or the other
            way around.
    """
    if bool(num_upper) != bool(num_levels) or num_surface + num_upper < 1:
        raise ValueError(
            "a state needs surface channels, or upper variables with levels; found num_surface="
            f"{num_surface}, num_upper={num_upper}, num_levels={num_levels}"
        )


class GridPatches:
    """How Adas cuts a grid into patches of rows and columns.

    Patches tile the grid; on a grid with an odd number of rows, which holds both poles, they are
    one row taller than their stride, so that neighbors share a row.

    Args:
        grid_shape: Latitude rows and longitude columns of the grid.
        patch_size: Rows and columns between patches.

    Attributes:
        kernel: Rows and columns of a patch.
        stride: Rows and columns between patches.
        shape: Rows and columns of patches.

    Raises:
        ValueError: The patches do not cover the grid exactly.
    """

    def __init__(self, grid_shape: tuple[int, int], patch_size: tuple[int, int]) -> None:
        rows, columns = grid_shape
        self.stride = (patch_size[0], patch_size[1])
        self.kernel = (patch_size[0] + rows % 2, patch_size[1])
        if (rows - rows % 2) % patch_size[0] or columns % patch_size[1]:
            raise ValueError(
                f"patches of {patch_size[0]} x {patch_size[1]} do not cover a grid of {rows} x "
                f"{columns}: choose divisors of {rows - rows % 2} and {columns}"
            )
        self.shape = ((rows - rows % 2) // patch_size[0], columns // patch_size[1])


class PatchEmbedding(nn.Module):
    """Embed surface fields and fields on levels as one volume of tokens (FengWu-Adas).

    Args:
        num_surface: S, channels without a level; 0 leaves the surface out.
        num_upper: V, variables on levels; 0 leaves the levels out.
        dim: Features d of a token.
        patches: The cut of the grid.

    Shape:
        Surface (B, S, H, W) and upper (B, V, L, H, W) to (B, d, D, H', W') with D = L levels, then
        one for the surface; channels-last strides.
    """

    def __init__(self, num_surface: int, num_upper: int, dim: int, patches: GridPatches) -> None:
        super().__init__()
        cut = (patches.kernel, patches.stride)
        self.upper = nn.Conv2d(num_upper, dim, *cut) if num_upper else None
        self.surface = nn.Conv2d(num_surface, dim, *cut) if num_surface else None
        self.norm = nn.LayerNorm(dim)

    def forward(self, surface: Tensor, upper: Tensor) -> Tensor:
        """Return the tokens, normalised over their features."""
        slices = []
        if self.upper is not None:
            levels = self.upper(upper.transpose(1, 2).flatten(0, 1))
            slices.append(levels.view(upper.shape[0], upper.shape[2], *levels.shape[1:]))
        if self.surface is not None:
            slices.append(self.surface(surface)[:, None])
        tokens = torch.cat([part.movedim(2, -1) for part in slices], dim=1)
        normalized: Tensor = self.norm(tokens)
        return normalized.movedim(-1, 1)


class PatchRecovery(nn.Module):
    """Undo `PatchEmbedding` by transposed convolutions of the same patches.

    Args:
        num_surface: S, channels without a level.
        num_upper: V, variables on levels.
        dim: Features d of a token.
        patches: The cut of the grid.

    Shape:
        (B, d, D, H', W') to (B, S + V * L, H, W), surface channels first.
    """

    def __init__(self, num_surface: int, num_upper: int, dim: int, patches: GridPatches) -> None:
        super().__init__()
        cut = (patches.kernel, patches.stride)
        self.upper = nn.ConvTranspose2d(dim, num_upper, *cut) if num_upper else None
        self.surface = nn.ConvTranspose2d(dim, num_surface, *cut) if num_surface else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the fields on the grid."""
        fields = []
        if self.surface is not None:
            fields.append(self.surface(x[:, :, -1]))
            x = x[:, :, :-1]
        if self.upper is not None:
            levels = self.upper(x.transpose(1, 2).flatten(0, 1))
            levels = levels.view(x.shape[0], x.shape[2], *levels.shape[1:])
            fields.append(levels.transpose(1, 2).flatten(1, 2))
        return torch.cat(fields, dim=1)

    def zero(self) -> None:
        """Let every output be zero, for a network that starts without an increment."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
