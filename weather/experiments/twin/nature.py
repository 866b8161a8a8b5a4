"""Nature runs: the model states that stand for the truth in an experiment."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.experiments.twin.nature_store import CHUNK, NatureStore, SavePoint
from weather.grid import Grid
from weather.state import ChannelSpec

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
