"""How a grid is cut into windows: partition and its inverse, shift, padding and mask."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100.0
"""Added to the attention logit of two cells that only the cyclic shift made neighbors."""

Extents = tuple[int, int, int]
"""Depth (level), latitude row, longitude column."""


@dataclass(frozen=True)
class WindowLayout:
    """Windows of a grid (D, H, W) of depth, latitude and longitude.

    The grid is padded with zeros after its last level, row and column to whole windows, then
    rolled back by ``shift`` cells. Windows count in depth, latitude, longitude order, and so do the
    cells of a window.

    Attributes:
        size: Extents of the grid.
        window: Extents of a window, none larger than the grid's.
        shift: Cells by which the windows are displaced.
    """

    size: Extents
    window: Extents
    shift: Extents

    @classmethod
    def of(cls, size: Extents, window: Extents, *, shifted: bool = False) -> WindowLayout:
        """Clip the window to the grid and shift it by half its extents.

        A dimension that is not larger than the window is covered by one window without a shift.
        """
        clipped = [min(s, w) for s, w in zip(size, window, strict=True)]
        shift = [w // 2 if shifted and s > w else 0 for s, w in zip(size, window, strict=True)]
        return cls(tuple(size), tuple(clipped), tuple(shift))  # type: ignore[arg-type]

    @property
    def counts(self) -> Extents:
        """Number of windows in each dimension."""
        depth, rows, columns = (
            math.ceil(s / w) for s, w in zip(self.size, self.window, strict=True)
        )
        return depth, rows, columns

    @property
    def padding(self) -> Extents:
        """Cells appended to each dimension."""
        depth, rows, columns = (
            n * w - s for n, w, s in zip(self.counts, self.window, self.size, strict=True)
        )
        return depth, rows, columns

    def partition(self, x: Tensor) -> Tensor:
        """Cut ``(B, C, D, H, W)`` of any strides into windows ``(B, num_windows, N, C)``."""
        x = x.movedim(1, -1)
        if any(self.padding):
            depth, rows, columns = self.padding
            x = F.pad(x, (0, 0, 0, columns, 0, rows, 0, depth))
        x = _roll(x, self.shift, sign=-1)
        (nd, nh, nw), (d, h, w) = self.counts, self.window
        x = x.reshape(x.shape[0], nd, d, nh, h, nw, w, x.shape[-1])
        windows = x.permute(0, 1, 3, 5, 2, 4, 6, 7)
        return windows.reshape(x.shape[0], nd * nh * nw, d * h * w, x.shape[-1])

    def reverse(self, windows: Tensor) -> Tensor:
        """Undo `partition`; the result ``(B, C, D, H, W)`` has channels-last strides."""
        (nd, nh, nw), (d, h, w) = self.counts, self.window
        x = windows.reshape(windows.shape[0], nd, nh, nw, d, h, w, windows.shape[-1])
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(x.shape[0], nd * d, nh * h, nw * w, x.shape[-1])
        x = _roll(x, self.shift, sign=1)
        if any(self.padding):
            x = x[:, : self.size[0], : self.size[1], : self.size[2]]
        return x.movedim(-1, 1)

    def inside(self, device: torch.device) -> Tensor | None:
        """Return ``(num_windows, N, 1)`` booleans, False in padding; None if nothing is padded."""
        return shape_constant(_inside, self, device) if any(self.padding) else None

    def mask(self, device: torch.device) -> Tensor | None:
        """Return what is added to attention logits, ``(depth * latitude windows, N, N)``.

        Cells that the roll brought together across the top and bottom or the two poles get
        `MASKED`. Longitude is periodic, therefore never masked and without an axis here; None if
        only longitude, or nothing, is shifted.
        """
        return shape_constant(_mask, self, device) if any(self.shift[:2]) else None


def _roll(x: Tensor, shift: Extents, *, sign: int) -> Tensor:
    dims = [dim for dim, step in enumerate(shift) if step]
    return x.roll([sign * shift[dim] for dim in dims], [dim + 1 for dim in dims]) if dims else x


def shape_constant(make: functools._lru_cache_wrapper[Tensor], *key: object) -> Tensor:
    """Take a constant from its cache; a traced program computes it, so that it stays a program."""
    if torch.compiler.is_compiling():
        return cast(Tensor, make.__wrapped__(*key))
    with torch.inference_mode(False):
        return make(*key)


@functools.lru_cache(maxsize=64)
def _inside(layout: WindowLayout, device: torch.device) -> Tensor:
    return layout.partition(torch.ones(1, 1, *layout.size, device=device))[0] > 0


@functools.lru_cache(maxsize=64)
def _mask(layout: WindowLayout, device: torch.device) -> Tensor:
    (nd, nh, _), (d, h, w) = layout.counts, layout.window
    depth = _regions(nd * d, d, layout.shift[0], device).view(nd, 1, d, 1)
    rows = _regions(nh * h, h, layout.shift[1], device).view(1, nh, 1, h)
    region = (3 * depth + rows).view(nd * nh, d * h).repeat_interleave(w, dim=1)
    return (region[:, :, None] != region[:, None, :]) * MASKED


def _regions(extent: int, window: int, shift: int, device: torch.device) -> Tensor:
    position = torch.arange(extent, device=device)
    if not shift:
        return torch.zeros_like(position)
    return (position >= extent - window).long() + (position >= extent - shift).long()
