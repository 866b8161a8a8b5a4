"""The replay buffer of FengWu: forecasts under way, which training continues."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_at_least, check_fraction
from weather.training.batch import generator

DRAW, PLACE = 1, 2  # keys of random numbers


class Underway(NamedTuple):
    """A forecast that is under way.

    Attributes:
        frames: (2, C, H, W), its last two states, physical units.
        member: Number of the trajectory that it forecasts.
        time: Index in it of the later of the two states.
        lead: Steps since it left the trajectory.
    """

    frames: Tensor
    member: int
    time: int
    lead: int


class ReplayBuffer:
    """Keep the model's own forecasts and let training continue them, one step at a time.

    Every row of the global batch has slots, each of which holds one forecast under way. A training
    step of a row starts from one of its slots, or from the data; the forecast that it makes
    replaces the one it started from, or begins a new one. So errors of many steps are trained on
    without a gradient through more than one (FengWu, arXiv 2304.02948). Rows do not exchange
    forecasts: whatever rank holds a row, what it takes depends on seed, step and row alone. The
    states are kept in the memory of the host.

    Args:
        rows: Rows of the global batch.
        slots: Forecasts under way of every row.
        shape: (C, H, W) of a state.
        max_lead: Steps after which a forecast is given up.
        fraction: Fraction of the steps that start from the buffer once it holds something.
        seed: Decides which slots are taken.

    Attributes:
        lead: (rows, slots) steps since the data, 0 where a slot is empty.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        shape: tuple[int, int, int],
        *,
        max_lead: int,
        fraction: float,
        seed: int,
    ) -> None:
        check_at_least(1, rows=rows, slots=slots, max_lead=max_lead)
        check_fraction(fraction=fraction)
        self.max_lead, self.fraction, self.seed = max_lead, fraction, seed
        self.frames = torch.zeros(rows, slots, 2, *shape)
        self.lead, self.member, self.time = (
            torch.zeros(rows, slots, dtype=torch.int64) for _ in range(3)
        )

    def draw(self, step: int, row: int) -> int | None:
        """Return the slot from which a row starts at a step; None for the data."""
        filled = self.lead[row].nonzero().flatten()
        draw = generator(self.seed, DRAW, step, row)
        if not len(filled) or float(torch.rand((), generator=draw)) >= self.fraction:
            return None
        return int(filled[int(torch.randint(len(filled), (), generator=draw))])

    def at(self, row: int, slot: int) -> Underway:
        """Return the forecast of a slot.

        Raises:
            ValueError: The slot is empty.
        """
        lead = int(self.lead[row, slot])
        if not lead:
            raise ValueError(f"slot {slot} of row {row} is empty")
        member, time = int(self.member[row, slot]), int(self.time[row, slot])
        return Underway(self.frames[row, slot], member, time, lead)

    def keep(self, step: int, row: int, slot: int | None, forecast: Underway) -> None:
        """Put a forecast where the one that it continues was, or begin a new one.

        A forecast beyond the largest lead leaves its slot empty. A new one takes an empty slot, or
        a random one.

        Args:
            step: Number of the step.
            row: Its row.
            slot: Where it started; None for the data.
            forecast: Its last two states.
        """
        if forecast.lead > self.max_lead:
            self.drop(row, slot)
            return
        if slot is None:
            empty = (self.lead[row] == 0).nonzero().flatten()
            draw = generator(self.seed, PLACE, step, row)
            drawn = int(torch.randint(self.lead.shape[1], (), generator=draw))
            slot = int(empty[0]) if len(empty) else drawn
        self.frames[row, slot] = forecast.frames.detach().to("cpu", torch.float32)
        self.lead[row, slot], self.member[row, slot] = forecast.lead, forecast.member
        self.time[row, slot] = forecast.time

    def drop(self, row: int, slot: int | None) -> None:
        """Empty a slot, if there is one."""
        if slot is not None:
            self.lead[row, slot] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the content, as a checkpoint holds it: tensors (rows, slots, ...)."""
        return {name: getattr(self, name) for name in ("frames", "lead", "member", "time")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the content of a checkpoint.

        Raises:
            GatesError: It has other rows or slots.
        """
        found, expected = tuple(state["lead"].shape), tuple(self.lead.shape)
        if found != expected:
            raise GatesError(
                f"the checkpoint holds forecasts of {found[0]} rows with {found[1]} slots, this "
                f"run has {expected[0]} with {expected[1]}: resume with data.timelines {found[0]} "
                f"and model.slots {found[1]}"
            )
        for name, own in self.state_dict().items():
            own.copy_(state[name])
