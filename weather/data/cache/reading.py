"""Reading a training cache frame by frame, the next ones in advance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.data.cache.layout import Shards, open_frames
from weather.state import Normalizer

AHEAD_BYTES = 256 * 2**20


class FrameCache:
    """The frames of a cache, read one by one; a thread reads ahead what will be asked for.

    Processes that get a copy open the files themselves.

    Args:
        path: Folder that :func:`weather.data.cache.writing.write_cache` wrote.

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
        found = [self._frames.attrs.get(name) for name in ("mean", "sd")]
        if None in found:
            raise GatesError(f"{self.path} has no statistics: delete it, so that it is made again")
        return Normalizer(*(torch.tensor(values, dtype=torch.float32) for values in found))

    @property
    def frames(self) -> Any:
        """The Zarr array (T,C,H,W), for what needs all frames."""
        return self._frames

    def positions(self, times: np.ndarray) -> np.ndarray:
        """Return the positions (N,) of some times, -1 where the cache lacks one."""
        own = self.times.astype("datetime64[s]")
        wanted = np.asarray(times).astype("datetime64[s]")
        places = np.searchsorted(own, wanted).clip(max=max(len(own) - 1, 0))
        return np.where(own[places] == wanted, places, -1)

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
