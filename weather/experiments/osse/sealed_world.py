"""Worlds whose timelines start away from the truth, and one that no choice has seen."""

from __future__ import annotations

import copy
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from weather.experiments.twin.world import Period, TwinWorld
from weather.training.stream import generator

PERTURBATION = 0.1  # of the difference of two unrelated states
FIRST = 8  # key of random numbers


class OsseWorld(TwinWorld):
    """A twin world whose timelines start from the truth of 24 hours before and a random error.

    The error is 0.1 times the difference of two states of different training members, one pair a
    timeline, the same for every method. Without it an autonomous model that starts from the truth
    of 24 hours before stays the truth of 24 hours before for ever, and is never a free run.

    Attributes:
        home: The world that lends climate and training members to a sealed one; None for any other.
    """

    home: Self | None = None

    def first_background(self, period: Period) -> Tensor:
        """Return the first backgrounds (B,1,C,H,W)."""
        pool = self.states("training")
        errors = []
        for member in self.members[period]:
            draw = generator(self.seed, member, FIRST)
            first, other = torch.randperm(pool.shape[1], generator=draw)[:2].tolist()
            times = torch.randint(len(pool), (2,), generator=draw).tolist()
            errors.append(pool[times[0], first] - pool[times[1], other])
        return (self.states(period)[0] + PERTURBATION * torch.stack(errors)).unsqueeze(1)

    def states(self, period: Period) -> Tensor:
        """Return the states (T,B,C,H,W) of a period, the lead included."""
        if self.home is None or period == "test":
            return super().states(period)
        return self.home.states(period)

    def sealed(self, seed: int, count: int, path: Path) -> Self:
        """Return a world of the same model and climate with other timelines for testing.

        Args:
            seed: Of its states, networks and noise.
            count: Timelines for testing.
            path: Zarr store of its nature run.
        """
        world = copy.copy(self)
        world.path, world.seed, world.home, world._nature = path, seed, self, None
        world.members, world.num_members = {**self.members, "test": range(count)}, count
        return world


def seal(*pieces: str) -> int:
    """Return the seed of the sealed world: 8 bytes of the SHA-256 of shipped weights and choices.

    No choice that is shipped can have seen the world of this seed, since it follows from them: from
    the chosen settings and the weights, not from the circumstances of their making.

    Args:
        pieces: Folders of the package, below ``weights``, as patterns such as
            ``osse_shallow_water/weights/ungated-s*``; what does not exist is left out.
    """
    digest, root = hashlib.sha256(), Path(str(files("weather"))) / "weights"
    folders = sorted({folder for piece in pieces for folder in root.glob(piece)})
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.is_file() and path.name != "record.json":
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.dumps(json.loads(content)["setting"], sort_keys=True).encode()
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(hashlib.sha256(content).digest())
    return int.from_bytes(digest.digest()[:8], "big")
