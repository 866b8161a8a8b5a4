"""Training caches: the states of a store as one sharded array that is read frame by frame."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.data.axes import to_tensor
from weather.data.climatology import channel_statistics
from weather.grid import Grid
from weather.progress import Tick, no_tick
from weather.state import ChannelSpec, Normalizer
from weather.variables import check_range


def contiguous_block(count: int, parts: int, part: int) -> range:
    """Return the positions of one of ``parts`` blocks of nearly equal length.

    Args:
        count: Positions to be dealt.
        parts: Number of blocks.
        part: Number of the block, from 0.

    Raises:
        ValueError: There is no such block.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts} does not exist")
    return range(part * count // parts, (part + 1) * count // parts)


FRAMES = "frames"
DIMENSIONS = ("time", "channel", "latitude", "longitude")
SHARD_BYTES = 128 * 2**20
TIME_UNITS = "seconds since 1970-01-01"


class Layout(NamedTuple):
    """What the frames of a cache are.

    Attributes:
        channels: The C channels.
        grid: The H latitudes and W longitudes.
        times: (T,) datetime64, ascending.
        identity: What the frames are made of, plain JSON values.
    """

    channels: ChannelSpec
    grid: Grid
    times: np.ndarray
    identity: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T,C,H,W)."""
        return len(self.times), self.channels.num_channels, *self.grid.shape

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame (C,H,W) in float32."""
        return 4 * int(np.prod(self.shape[1:]))

    @property
    def shard_frames(self) -> int:
        """Frames in a shard: those of 128 MiB, one at least."""
        return max(1, min(len(self.times), SHARD_BYTES // self.frame_bytes))

    def create(self, path: Path) -> zarr.Array[Any]:
        """Return a new array (T,C,H,W) at a path, without frames."""
        group = zarr.open_group(path, mode="w-", zarr_format=3)
        seconds = self.times.astype("datetime64[s]").astype(np.int64)
        time = group.create_array("time", data=seconds, dimension_names=("time",))
        time.attrs.update({"units": TIME_UNITS, "calendar": "proleptic_gregorian"})
        for name in ("latitude", "longitude"):
            group.create_array(name, data=getattr(self.grid, name).numpy(), dimension_names=(name,))
        frames = group.create_array(
            FRAMES,
            shape=self.shape,
            chunks=(1, *self.shape[1:]),
            shards=(self.shard_frames, *self.shape[1:]),
            dtype=np.float32,
            fill_value=float("nan"),
            compressors=None,
            dimension_names=DIMENSIONS,
        )
        channels = {name: getattr(self.channels, name) for name in ("surface", "upper", "levels")}
        frames.attrs.update({"channels": channels, "identity": dict(self.identity)})
        return frames


def open_frames(path: Path) -> tuple[zarr.Array[Any], Layout]:
    """Open a cache for reading.

    Raises:
        GatesError: It is missing or damaged.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        frames = group[FRAMES]
        assert isinstance(frames, zarr.Array)
        seconds, latitude, longitude = (
            np.asarray(group[name][...])  # type: ignore[index]
            for name in ("time", "latitude", "longitude")
        )
        grid = Grid(torch.from_numpy(latitude), torch.from_numpy(longitude))
        channels = ChannelSpec(**dict(frames.attrs["channels"]))  # type: ignore[arg-type]
        identity = dict(frames.attrs["identity"])  # type: ignore[arg-type]
        layout = Layout(channels, grid, seconds.astype("datetime64[s]"), identity)
        if frames.shape != layout.shape:
            raise ValueError(f"{frames.shape} frames for {layout.shape} coordinates")
        if frames.compressors or frames.dtype != np.float32 or frames.shards is None:
            raise ValueError("frames are not float32 in shards without compression")
    except Exception as error:  # zarr raises errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(
            f"{path} is no training cache that can be read ({reason}): delete it, so that it is "
            "made again"
        ) from error
    return frames, layout


class Shards:
    """Reads frames from the files of a cache, each straight into the memory of its tensor.

    A shard ends with its index: offset and length of each of its frames, 64 bits each, and a
    checksum of 32 bits (Zarr 3, sharding codec).

    Args:
        path: Of the cache.
        frames: Its array.
    """

    def __init__(self, path: Path, frames: zarr.Array[Any]) -> None:
        assert frames.shards is not None
        self.folder, self.shape = path / FRAMES / "c", frames.shape[1:]
        self.length = frames.shards[0]

    def read(self, position: int) -> Tensor:
        """Return a frame (C,H,W), float32.

        Raises:
            OSError: A file is missing.
            ValueError: A frame is missing or too short.
        """
        shard, place = divmod(position, self.length)
        frame = torch.empty(self.shape)
        with self.folder.joinpath(str(shard), "0", "0", "0").open("rb", buffering=0) as file:
            file.seek(-16 * (self.length - place) - 4, os.SEEK_END)
            offset, size = np.frombuffer(file.read(16), dtype="<u8").tolist()
            if size != frame.nbytes:
                raise ValueError("the shard lacks it")
            file.seek(offset)
            rest = frame.numpy().data.cast("B")
            while len(rest):
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"the shard ends {len(rest)} bytes too early")
                rest = rest[count:]
        return frame


def same_identity(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether two identities agree once they are JSON."""
    return json.loads(json.dumps(dict(found))) == json.loads(json.dumps(dict(expected)))


AHEAD_BYTES = 256 * 2**20


class FrameCache:
    """The frames of a cache, read one by one; a thread reads ahead what will be asked for.

    Processes that get a copy open the files themselves.

    Args:
        path: Folder that `weather.data.training_cache.write_cache` wrote.

    Attributes:
        channels: Its C channels.
        grid: Its H latitudes and W longitudes.
        times: (T,) datetime64, ascending.
        identity: What the frames are made of.

    Raises:
        GatesError: It is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        self._frames, layout = open_frames(self.path)
        self._shards = Shards(self.path, self._frames)
        self.channels, self.grid, self.times, self.identity = layout
        self._most = max(1, AHEAD_BYTES // layout.frame_bytes)
        self._reader: ThreadPoolExecutor | None = None
        self._waiting: dict[int, Future[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, position: int) -> Tensor:
        """Return a frame (C,H,W), float32.

        Raises:
            GatesError: It is missing or damaged.
        """
        waiting = self._waiting.pop(position, None)
        return self._read(position) if waiting is None else waiting.result()

    def ahead(self, positions: Iterable[int]) -> None:
        """Begin to read frames that will be asked for soon.

        At most 256 MiB of them wait, and one at least; the oldest are forgotten first.
        """
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="frames")
        for position in positions:
            if position not in self._waiting:
                self._waiting[position] = self._reader.submit(self._read, position)
        for position in list(self._waiting)[: max(0, len(self._waiting) - self._most)]:
            self._waiting.pop(position).cancel()

    def normalizer(self) -> Normalizer:
        """Return mean and standard deviation of every channel.

        Raises:
            GatesError: The cache was written without them.
        """
        statistics = [self._frames.attrs.get(name) for name in ("mean", "sd")]
        if None in statistics:
            raise GatesError(f"{self.path} has no statistics: delete it, so that it is made again")
        return Normalizer(*(torch.tensor(values, dtype=torch.float32) for values in statistics))

    @property
    def frames(self) -> Any:
        """The Zarr array (T,C,H,W), for what needs all frames."""
        return self._frames

    def positions(self, times: np.ndarray) -> np.ndarray:
        """Return the positions (N,) of some times, -1 where the cache lacks one."""
        stored = self.times.astype("datetime64[s]")
        wanted = np.asarray(times).astype("datetime64[s]")
        places = np.searchsorted(stored, wanted).clip(max=max(len(stored) - 1, 0))
        return np.where(stored[places] == wanted, places, -1)

    def _read(self, position: int) -> Tensor:
        try:
            frame = self._shards.read(int(position))
        except (OSError, ValueError) as error:
            raise self._damaged(position, str(error)) from error
        if not bool(frame.flatten(1).sum(1).isfinite().all()):
            raise self._damaged(position, "values that are not finite")
        return frame

    def _damaged(self, position: int, reason: str) -> GatesError:
        stamp = np.datetime_as_string(self.times[position], unit="m")
        return GatesError(
            f"{self.path}: the frame of {stamp} is damaged ({reason}): delete the cache, so that "
            "it is made again"
        )


class FrameLoader:
    """Frames in order of time, each read while the one before it is in use.

    Args:
        cache: The frames.
        positions: Which of them, in order; all if None.
    """

    def __init__(self, cache: FrameCache, positions: Iterable[int] | None = None) -> None:
        self.cache = cache
        self.positions = list(range(len(cache)) if positions is None else positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield tensors (C,H,W)."""
        for number, position in enumerate(self.positions, 1):
            frame = self.cache[position]
            self.cache.ahead(self.positions[number : number + 1])
            yield frame
            del frame  # the caller has it now


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
            statistics = channel_statistics(array, layout.grid.area_weights(), statistics_of)
            array.attrs.update(
                {name: value.tolist() for name, value in statistics._asdict().items()}
            )
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
        dataset: Of `weather.data.store.open_wb2`, without members or leads.
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
