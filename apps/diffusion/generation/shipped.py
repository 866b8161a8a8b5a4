"""What ships, or was trained in the run folder ``embedded``; nothing is trained for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from apps.diffusion.studies.retrieval import ENCODER, UNSEEN
from apps.diffusion.works.adapter import file_in
from apps.diffusion.works.encoder import FOLDER, EncoderForm
from apps.diffusion.works.gates import FILE, GatesForm
from apps.diffusion.world import World
from core_gates.errors import GatesError
from diffusion.data.concepts import concepts
from harness.experiment.record import read_record
from harness.files.atomic import replacing

GATES = "gates-s0"
"""Folder of the gates that are used."""


class Shipped(NamedTuple):
    """Paths of what is at hand.

    Attributes:
        base: Folder of the base; None if it is missing.
        adapters: Concept -> file of its adapter of seed 0.
        encoder: Folder of the encoder of adapters; None if it is missing.
        gates: File of the gates; None if they are missing, or of another base or zoo.
    """

    base: Path | None
    adapters: dict[str, Path]
    encoder: Path | None
    gates: Path | None

    @property
    def lacking(self) -> list[str]:
        """What is missing, in words."""
        parts = {
            "base": self.base,
            "adapters": len(self.adapters) == len(concepts()),
            "encoder": self.encoder,
            "gates": self.gates,
        }
        return [name for name, found in parts.items() if not found]


def shipped(world: World) -> Shipped:
    """Return what is at hand of a world.

    Raises:
        GatesError: The run folder holds results with other settings.
    """
    named = {one.name: world.adapter_piece(one, 0) for one in concepts()}
    adapters = {
        name: file_in(folder)
        for name, piece in named.items()
        if (folder := world.adapters.find(piece)) is not None
    }
    whole = len(adapters) == len(named)
    return Shipped(
        world.bases.find(world.base_piece),
        adapters,
        _encoder(world) if whole else None,
        _gates(world) if whole else None,
    )


def collected(files: dict[str, Path], folder: Path) -> Path:
    """Copy adapters into one folder, which a library can index, and return it.

    Args:
        files: Name -> LoRA file.
        folder: Holds one file per name afterwards; those that have not changed stay.

    Raises:
        GatesError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GatesError(
            f"{folder} cannot be written ({error.strerror}): give another --root"
        ) from error
    for old in folder.glob("*.safetensors"):
        if old.stem not in files:
            old.unlink()
    for name, file in files.items():
        target = folder / f"{name}.safetensors"
        if not target.is_file() or _stamp(target) != _stamp(file):
            with replacing(target) as temporary:
                shutil.copy2(file, temporary)
    return folder


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _encoder(world: World) -> Path | None:
    trained = [one.name for one in concepts() if one.name not in UNSEEN]
    piece = world.encoder_piece("encoder", 0, concepts=trained, **ENCODER)
    folder = world.run.store("encoders", EncoderForm()).find(piece)
    return None if folder is None else folder / FOLDER


def _gates(world: World) -> Path | None:
    store = world.run.store("gates", GatesForm())
    for place in (store.folder, store.shipped):
        record = None if place is None else read_record(place / GATES)
        if record is not None and record.settings.get("start") == world.gates_start:
            assert place is not None
            return place / GATES / FILE
    return None
