"""Writing the store of a nature run: blocks, save points, and the final rename."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import dask.array
import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.data.tensors import to_dataset
from weather.experiments.identity import differences
from weather.grid import Grid
from weather.state import ChannelSpec
from weather.variables import unit_of

CHUNK = 20
"""Times in a chunk of the store, and steps between two save points."""

ORIGIN = np.datetime64("2000-01-01", "ns")
"""Time of the first stored state; a model year has no meaning beyond order."""

TIME_ENCODING = {
    "units": "seconds since 2000-01-01",
    "calendar": "proleptic_gregorian",
    "dtype": "int64",
}


class SavePoint(NamedTuple):
    """Where an interrupted run continues.

    Attributes:
        step: Calls of the model since the initial state.
        written: Times that the store holds for good.
        state: (N, C, H, W) float32 after ``step`` calls.
    """

    step: int
    written: int
    state: Tensor


class NatureStore:
    """A Zarr store that is filled in blocks next to its path and renamed when complete.

    A save point is written, by an atomic rename, only after the blocks that it counts; blocks
    after it may be damaged by a kill and are written again.

    Args:
        path: Final place of the store.
        channels: The C channels.
        grid: The H latitudes and W longitudes.
        identity: What determines the states; ``members`` and ``hours`` are read here.
        num_times: Times of the store.
    """

    def __init__(
        self,
        path: Path,
        channels: ChannelSpec,
        grid: Grid,
        identity: dict[str, Any],
        num_times: int,
    ) -> None:
        self.path = path
        self.channels = channels
        self.grid = grid
        self.members = int(identity["members"])
        self.num_times = num_times
        self.identity = json.dumps(identity, sort_keys=True)
        step = np.timedelta64(round(identity["hours"] * 3600), "s")
        self.times = ORIGIN + np.arange(num_times) * step
        self.folder = path.with_name(f".{path.name}.partial")
        self._store = self.folder / "store"
        self._point = self.folder / "point.npz"

    def is_complete(self) -> bool:
        """Return whether the path holds this run, of this length or longer.

        Raises:
            GatesError: The path holds something else.
        """
        if not self.path.exists():
            return False
        found, times = _read_identity(self.path)
        if found != self.identity or times < self.num_times:
            raise GatesError(
                f"{self.path} holds another run ({times} times, {self.num_times} needed"
                f"{_told(found, self.identity)}): remove it or name another path"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def resume(self) -> SavePoint | None:
        """Return the last save point of this run, or None; one of another run is discarded."""
        if self._point.exists():
            with np.load(self._point, allow_pickle=False) as point:
                if str(point["identity"]) == self.identity and self.num_times == point["num_times"]:
                    state = torch.from_numpy(point["state"])
                    return SavePoint(int(point["step"]), int(point["written"]), state)
        return None

    def create(self) -> None:
        """Lay out the empty store."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        shape = (1, self.members, self.channels.num_channels, *self.grid.shape)
        sample = to_dataset(torch.zeros(shape), self.channels, self.grid, times=self.times[:1])
        length = min(CHUNK, self.num_times)
        fields, encoding = {}, {"time": dict[str, Any](TIME_ENCODING)}
        for name, array in sample.items():
            chunks = (length, *array.shape[1:])
            empty = dask.array.zeros(
                (self.num_times, *array.shape[1:]), dtype=np.float32, chunks=chunks
            )
            fields[name] = (array.dims, empty, {"units": unit_of(str(name)) or "1"})
            encoding[str(name)] = {"chunks": chunks}
        coordinates = dict(sample.drop_vars("time").coords) | {"time": self.times}
        template = xr.Dataset(fields, coordinates, {"nature_run": self.identity})
        template.to_zarr(
            self._store,
            mode="w",
            compute=False,
            encoding=encoding,
            consolidated=True,
            zarr_format=2,
        )

    def write(self, first: int, states: Tensor) -> None:
        """Write states (T, N, C, H, W) from the time with index ``first`` on, a whole chunk."""
        times = self.times[first : first + len(states)]
        block = to_dataset(states, self.channels, self.grid, times=times)
        block = block.drop_vars(list(block.coords))
        region = {"time": slice(first, first + len(states))}
        block.to_zarr(self._store, mode="r+", region=region, consolidated=True)

    def save(self, point: SavePoint) -> None:
        """Replace the save point."""
        with replacing(self._point) as draft:
            np.savez(
                draft,
                step=point.step,
                written=point.written,
                state=point.state.cpu().numpy(),
                identity=self.identity,
                num_times=self.num_times,
            )

    def finish(self) -> None:
        """Put the complete store in its place."""
        self._store.replace(self.path)
        shutil.rmtree(self.folder)


def _told(found: str, expected: str) -> str:
    difference = differences(found, expected)
    return f"; {difference}" if difference else ""


def _read_identity(path: Path) -> tuple[str, int]:
    """Return what identifies the run at a path, and its number of times."""
    try:
        with xr.open_zarr(path, chunks=None) as dataset:
            return str(dataset.attrs["nature_run"]), dataset.sizes["time"]
    except (KeyError, ValueError, OSError, TypeError):
        return "no nature run", 0
