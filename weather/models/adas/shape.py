"""The shape of Adas that a grid and its channels ask for."""

from __future__ import annotations

from typing import Any

MOST_COLUMNS = 64  # of tokens: what trains on a processor; more take a finer patch by hand
PATCHES = (*range(2, 25), 1)
WINDOWS = (5, 4, 6, 3, 7, 8, 2)


def network_shape(
    grid_shape: tuple[int, int], num_surface: int, num_upper: int, num_levels: int
) -> dict[str, Any]:
    """Return arguments of :class:`~.network.Adas` for a grid and channels.

    Patches are the smallest that cover the grid and leave at most 64 columns of tokens, in rows
    that windows divide at all three scales, twice at least: then nothing is padded around the globe
    and the network is equivariant in longitude. Where no patch does so, windows are padded.

    Args:
        grid_shape: Latitude rows and longitude columns.
        num_surface: Channels without a level.
        num_upper: Variables on levels.
        num_levels: Levels of each of them.
    """
    patch, window = _patch_and_window(grid_shape)
    rows = -(-(grid_shape[0] // patch) // 4)  # of tokens at the coarsest scale
    deep = num_levels + bool(num_surface) > 2
    first = 3 if deep else 1
    return {
        "grid_shape": list(grid_shape),
        "num_surface": num_surface,
        "num_upper": num_upper,
        "num_levels": num_levels,
        "patch_size": [patch, patch],
        "window_size": [2 if num_levels + bool(num_surface) > 1 else 1, min(window, rows), window],
        "kernel_sizes": [[first, 3, 5], [first, 3, 3], [first, 3, 3]],
    }


def _patch_and_window(grid_shape: tuple[int, int]) -> tuple[int, int]:
    rows, columns = grid_shape
    covering = [p for p in PATCHES if (rows - rows % 2) % p == 0 and columns % p == 0]
    few = [p for p in covering if columns // p <= MOST_COLUMNS and rows // p >= 4] or covering
    for patch in few:
        coarse, rest = divmod(columns // patch, 4)
        for window in WINDOWS:
            if not rest and coarse % window == 0 and coarse // window >= 2:
                return patch, window
    return few[0], 4
