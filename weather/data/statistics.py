"""Mean, standard deviation and mean square of states that do not fit into memory, by Dask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import dask
import dask.array
import numpy as np
from torch import Tensor

THREADS = 2
"""Frames in memory at a time, each next to one field in float64."""


class Statistics(NamedTuple):
    """Of every channel (C,), float64: mean and standard deviation."""

    mean: np.ndarray
    sd: np.ndarray


def channel_statistics(
    frames: Any, area_weights: Tensor, positions: Sequence[int] | np.ndarray | None = None
) -> Statistics:
    """Return area-weighted mean and standard deviation, from moments of every frame.

    The moments of two sets of frames combine without a loss of digits (Chan, Golub and LeVeque
    1983).

    Args:
        frames: (T,C,H,W), a Zarr or a NumPy array.
        area_weights: (H,), mean 1.
        positions: Times that count, all if None.
    """
    moments = _reduced(_Moments(area_weights.numpy()), _lazy(frames, positions))  # (T, 2, C)
    mean = moments[:, 0].mean(0)
    variance = (moments[:, 1] + (moments[:, 0] - mean) ** 2).mean(0)
    return Statistics(mean, np.sqrt(variance))


def root_mean_square_difference(
    frames: Any,
    others: Any,
    area_weights: Tensor,
    pairs: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return the root mean square (C,) of the differences of frames, such as background errors.

    Args:
        frames: (T,C,H,W), a Zarr or a NumPy array.
        others: Another one, (T',C,H,W).
        area_weights: (H,), mean 1.
        pairs: Positions (N,) in the first and in the second array.
    """
    first, second = _lazy(frames, pairs[0]), _lazy(others, pairs[1])
    squares = _reduced(_SquareDifference(area_weights.numpy()), first, second)  # (N, 1, C)
    return np.asarray(np.sqrt(squares[:, 0].mean(0)))


class _Moments:
    """Mean and variance (N,2,C) of each frame, channel by channel in float64."""

    rows = 2

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights[:, None] / weights.sum()

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        found = np.empty((len(frames), 2, frames.shape[1]))
        for place in np.ndindex(frames.shape[:2]):
            field = frames[place].astype(np.float64)
            weights = self.weights / field.shape[1]
            mean = (field * weights).sum()
            found[place[0], :, place[1]] = mean, ((field - mean) ** 2 * weights).sum()
        return found


class _SquareDifference:
    """Mean square difference (N,1,C) of each pair of frames."""

    rows = 1

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights[:, None] / weights.sum()

    def __call__(self, frames: np.ndarray, others: np.ndarray) -> np.ndarray:
        found = np.empty((len(frames), 1, frames.shape[1]))
        for place in np.ndindex(frames.shape[:2]):
            gap = frames[place].astype(np.float64) - others[place]
            found[place[0], 0, place[1]] = (gap**2 * self.weights / gap.shape[1]).sum()
        return found


def _lazy(frames: Any, positions: Sequence[int] | np.ndarray | None) -> dask.array.Array:
    """Return frames as a Dask array, a frame to a chunk."""
    whole = dask.array.from_array(frames, chunks=(1, *frames.shape[1:]))
    return whole if positions is None else whole[np.asarray(positions)]


def _reduced(function: Any, *arrays: dask.array.Array) -> np.ndarray:
    """Return what a function makes of each frame, (N, rows, C)."""
    count, channels = arrays[0].shape[:2]
    if not count:
        raise ValueError("cannot compute statistics: there is no frame")
    blocks = dask.array.map_blocks(
        function,
        *arrays,
        dtype=np.float64,
        chunks=(arrays[0].chunks[0], (function.rows,), (channels,)),
        drop_axis=(2, 3),
        new_axis=(1,),
        meta=np.empty((0, 0, 0)),
    )
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        return np.asarray(blocks.compute())
