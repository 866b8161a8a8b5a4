"""How a training cache lies on disk: one sharded array with its coordinates and statistics."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from torch import Tensor

from core_gates.errors import GatesError
from weather.grid import Grid
from weather.state import ChannelSpec

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
            degrees = getattr(self.grid, name).numpy()
            group.create_array(name, data=degrees, dimension_names=(name,))
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
