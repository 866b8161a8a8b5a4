"""Writing a training cache, shard by shard, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.data.cache.layout import Layout
from weather.data.statistics import channel_statistics
from weather.data.tensors import to_tensor
from weather.progress import Tick, no_tick
from weather.ranges import check_range
from weather.state import ChannelSpec

BLOCK_BYTES = 64 * 2**20


def write_cache(
    path: Path,
    layout: Layout,
    frames: Iterable[Tensor],
    *,
    statistics_of: Sequence[int] = (),
    tick: Tick = no_tick,
) -> Path:
    """Write frames in order of time, and replace what lies at the path when all are there.

    One shard is held in memory at a time.

    Args:
        path: Folder of the cache.
        layout: Channels, grid and times of the frames.
        frames: T tensors (C,H,W), or blocks (N,C,H,W) of successive ones.
        statistics_of: Positions whose mean and standard deviation (area-weighted) become the
            attributes ``mean`` and ``sd``; none are written for none.
        tick: Called for every frame.

    Raises:
        GatesError: There are fewer or more frames than times.
    """
    with replacing(path) as partial:
        array, count = layout.create(partial), 0
        for shard in _shards(frames, layout.shard_frames):
            if count + len(shard) > len(layout.times):
                count += len(shard)
                break
            array[count : count + len(shard)] = shard
            count += len(shard)
            for _ in shard:
                tick()
        if count != len(layout.times):
            raise GatesError(f"{path}: {count} frames for {len(layout.times)} times")
        if len(statistics_of):
            found = channel_statistics(array, layout.grid.area_weights(), statistics_of)
            array.attrs.update({name: value.tolist() for name, value in found._asdict().items()})
    return path


def _shards(frames: Iterable[Tensor], length: int) -> Iterator[np.ndarray]:
    """Yield arrays (length,C,H,W) of frames; the last may be shorter."""
    waiting: list[np.ndarray] = []
    for frame in frames:
        block = frame.numpy()
        waiting += list(block) if block.ndim == 4 else [block]
        while len(waiting) >= length:
            yield waiting[0][None] if length == 1 else np.stack(waiting[:length])
            del waiting[:length]
    if waiting:
        yield np.stack(waiting)


def store_frames(
    dataset: xr.Dataset, channels: ChannelSpec, positions: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Read the frames of a store in blocks (N,C,H,W), and judge every one of them.

    Args:
        dataset: Of :func:`weather.data.wb2.open_wb2`, without members or leads.
        channels: Variables and levels.
        positions: Which times, all if None.

    Raises:
        GatesError: A value is missing, impossible or a whole field constant, as in a store that was
            never written to its end; without the name of the store.
    """
    every = np.arange(dataset.sizes["time"]) if positions is None else np.asarray(positions)
    bytes_each = 8 * channels.num_channels * dataset.sizes["latitude"] * dataset.sizes["longitude"]
    length = max(1, BLOCK_BYTES // bytes_each)
    for start in range(0, len(every), length):
        block = dataset.isel(time=every[start : start + length])
        stamps = np.datetime_as_string(block["time"].values, unit="h")
        states = to_tensor(block, channels, allow_missing=True)
        _check(states, channels, stamps)
        yield states


def _check(states: Tensor, channels: ChannelSpec, stamps: np.ndarray) -> None:
    """Refuse fields that nothing has been written to, and values of another unit."""
    missing = (~states.isfinite()).flatten(2).float().mean(2)  # (N,C)
    if bool(missing.any()):
        time, channel = missing.nonzero()[0].tolist()
        cause = "write the store again, it may be half-written"
        raise GatesError(
            f"{channels.labels[channel]} is missing (NaN) in {100 * missing[time, channel]:.3g} % "
            f"of its values at {stamps[time]}, expected none: "
            f"{cause if missing[time, channel] == 1 else 'fill them'}, or choose another period or "
            "other channels"
        )
    low, high = states.amin((-2, -1)), states.amax((-2, -1))  # (N,C)
    constant = (low == high).nonzero()
    if len(constant):
        time, channel = constant[0].tolist()
        raise GatesError(
            f"{channels.labels[channel]} is {float(low[time, channel]):g} everywhere at "
            f"{stamps[time]}, expected a field that varies: the store may be half-written, write "
            "it again or choose another period or other channels"
        )
    for lows, highs, stamp in zip(low.tolist(), high.tolist(), stamps, strict=True):
        for (name, _), lowest, highest in zip(channels, lows, highs, strict=True):
            try:
                check_range(name, lowest, highest)
            except GatesError as error:
                raise GatesError(f"{stamp}: {error}") from error
