"""Nature runs: model states that stand for the truth, written in blocks with save points."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import dask.array
import numpy as np
import torch
import xarray as xr
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.data.axes import to_dataset
from weather.data.writing import differences
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
        self.path, self.channels, self.grid = path, channels, grid
        self.members, self.num_times = int(identity["members"]), num_times
        self.identity = json.dumps(identity, sort_keys=True)
        self.times = ORIGIN + np.arange(num_times) * np.timedelta64(
            round(identity["hours"] * 3600), "s"
        )
        self.folder = path.with_name(f".{path.name}.partial")
        self._store = self.folder / "store"
        self._point = self.folder / "point.npz"

    def is_complete(self) -> bool:
        """Return whether the run is stored, clearing its unfinished blocks; refuse another run.

        Raises:
            GatesError: The path holds something else.
        """
        if not self.path.exists():
            return False
        stored, times = _read_identity(self.path)
        if stored != self.identity or times < self.num_times:
            difference = differences(stored, self.identity)
            raise GatesError(
                f"{self.path} holds another run ({times} times, {self.num_times} needed"
                f"{f'; {difference}' if difference else ''}): remove it or name another path"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def resume(self) -> SavePoint | None:
        """Return the last save point of this run, or None; one of another run is discarded."""
        if self._point.exists():
            with np.load(self._point, allow_pickle=False) as point:
                if str(point["identity"]) == self.identity and self.num_times == point["num_times"]:
                    return SavePoint(
                        int(point["step"]), int(point["written"]), torch.from_numpy(point["state"])
                    )
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
        xr.Dataset(fields, coordinates, {"nature_run": self.identity}).to_zarr(
            self._store,
            mode="w",
            compute=False,
            encoding=encoding,
            consolidated=True,
            zarr_format=2,
        )

    def write(self, first: int, states: Tensor) -> None:
        """Write states (T, N, C, H, W) from the time with index ``first`` on, a whole chunk."""
        block = to_dataset(
            states, self.channels, self.grid, times=self.times[first : first + len(states)]
        )
        block = block.drop_vars(list(block.coords))
        block.to_zarr(
            self._store,
            mode="r+",
            region={"time": slice(first, first + len(states))},
            consolidated=True,
        )

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


def _read_identity(path: Path) -> tuple[str, int]:
    """Return what identifies the run at a path, and its number of times."""
    try:
        with xr.open_zarr(path, chunks=None) as dataset:
            return str(dataset.attrs["nature_run"]), dataset.sizes["time"]
    except (KeyError, ValueError, OSError, TypeError):
        return "no nature run", 0


Progress = Callable[[int, int], None]
"""Called with the number of calls of the model that are done, and with their total."""


class NatureModel(Protocol):
    """A forecast model that knows its grid, its channels and how to start."""

    @property
    def grid(self) -> Grid:
        """The H latitudes and W longitudes."""

    @property
    def channels(self) -> ChannelSpec:
        """The C channels."""

    @property
    def description(self) -> str:
        """One line that identifies the model and its settings."""

    def initial_state(self, members: int, *, seed: int) -> Tensor:
        """Return (N, C, H, W) from which different members diverge."""

    def __call__(self, state: Tensor, hours: float) -> Tensor:
        """Return the state some hours later."""


@torch.no_grad()
def nature_run(
    model: Callable[[Tensor, float], Tensor], state: Tensor, num_steps: int, *, hours: float = 6.0
) -> Iterator[Tensor]:
    """Yield states some hours apart, the first being the given one.

    Every state is rounded to float32 and the next is computed from it, so a run that continues from
    a stored state equals one that never stopped, and a perfect forecast equals nature.

    Args:
        model: Any forecast model.
        state: (N, C, H, W), physical units.
        num_steps: Number of states to yield.
        hours: Time between states.

    Raises:
        GatesError: The model left the finite numbers.
    """
    state = state.float()
    for step in range(num_steps):
        if step:
            state = model(state, hours).float()
        if not state.isfinite().all():
            raise GatesError(
                f"the model is not finite after {step * hours:g} hours: take a shorter time step "
                "or weaker forcing"
            )
        yield state


def write_nature_run(
    path: str | Path,
    model: NatureModel,
    *,
    members: int,
    num_steps: int,
    spin_up_days: float,
    seed: int,
    hours: float = 6.0,
    progress: Progress | None = None,
) -> Path:
    """Write a nature run as a Zarr store in the schema of WeatherBench 2.

    The store has the dimensions time, number (the member), level if there are upper variables,
    latitude and longitude; its first time is the end of the spin-up. It appears under its path
    when it is complete. A run that was killed, at whatever moment, continues from its last saved
    point, and ends with the same bits as an uninterrupted run.

    Args:
        path: Where to write the store. A complete run of the same model and arguments, or a longer
            one, is left as it is.
        model: The model.
        members: Independent trajectories.
        num_steps: Number of stored times.
        spin_up_days: Days between the initial states and the first stored time.
        seed: Seed of the initial states.
        hours: Time between stored states.
        progress: Reports after every call of the model, spin-up included.

    Returns:
        The path.

    Raises:
        GatesError: The path holds something else, an argument is out of range, or the model left
            the finite numbers.
    """
    calls = math.ceil(spin_up_days * 24 / hours)
    if members < 1 or num_steps < 1 or calls < 0:
        raise GatesError(
            f"a nature run needs members >= 1, num_steps >= 1 and spin_up_days >= 0, got "
            f"{members}, {num_steps} and {spin_up_days}"
        )
    identity = {
        "model": model.description,
        "members": members,
        "spin_up_days": float(spin_up_days),
        "seed": seed,
        "hours": float(hours),
    }
    store = NatureStore(Path(path), model.channels, model.grid, identity, num_steps)
    if store.is_complete():
        return store.path
    point = store.resume()
    if point is None:
        point = SavePoint(0, 0, model.initial_state(members, seed=seed).float())
        store.create()
    run = nature_run(model, point.state, calls + num_steps - point.step, hours=hours)
    _write_blocks(store, run, point, calls, progress)
    return store.path


def _write_blocks(
    store: NatureStore,
    run: Iterator[Tensor],
    point: SavePoint,
    spin_up_calls: int,
    progress: Progress | None,
) -> None:
    """Fill a store with the states of a run that starts from its save point."""
    last, written = spin_up_calls + store.num_times - 1, point.written
    block: list[Tensor] = []
    for step, state in enumerate(run, start=point.step):
        if progress is not None and step > point.step:
            progress(step, last)
        if step >= spin_up_calls + point.written:
            block.append(state)
        if block and (len(block) == CHUNK or step == last):
            store.write(written, torch.stack(block))
            written += len(block)
            block = []
            store.save(SavePoint(step, written, state))
        elif step < spin_up_calls and step % CHUNK == 0:
            store.save(SavePoint(step, written, state))
    store.finish()
