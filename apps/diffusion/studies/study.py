"""What every study of ``gates diffusion evaluate`` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from apps.diffusion.world import World
from harness.experiment import Piece, Run


class Asked(NamedTuple):
    """Options of ``evaluate``.

    Attributes:
        run: In the run folder of the configuration.
        seeds: Of what is trained for the study.
        vectors: Folder of golden vectors; None for that of the configuration.
    """

    run: Run
    seeds: tuple[int, ...] = (0, 1, 2)
    vectors: Path | None = None


class Method(NamedTuple):
    """A row of the tables.

    Attributes:
        name: In tables.
        rival: What computes it.
        settings: Of it.
        trained: Folders of what was trained, by seed; empty if nothing is trained.
    """

    name: str
    rival: str
    settings: Mapping[str, Any]
    trained: Mapping[int, Path] = {}


class Comparison(Protocol):
    """What figures of ways to use several adapters are made with.

    Attributes:
        run: Of the comparison.
        world: Base, zoo and drawings.
        files: Concept -> LoRA file.
        places: Where files are on this machine.
    """

    run: Run
    world: World
    files: dict[str, Path]
    places: dict[str, Any]

    def piece(self, method: Method, group: str, seed: int | None, **changes: Any) -> Piece:
        """Return the piece that a figure of a method on the test drawings of a group is."""
        ...
