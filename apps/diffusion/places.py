"""What training runs begin with, identified by its content: a base, the zoo, the run of a verb."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apps.diffusion.options import Machine
from apps.diffusion.world import World
from core_gates.errors import GatesError
from diffusion.lora_file.family import shape_in
from harness.command.verbs import Place
from harness.experiment import Run
from harness.files import content_digest
from harness.files.digest import short_digest


class Base(NamedTuple):
    """A base.

    Attributes:
        folder: Of the embedded base or of a pipeline.
        digest: What tells it from others.
    """

    folder: Path
    digest: str


def root_of(place: Place) -> Path:
    """Return the folder of all runs."""
    return place.run_folder.path.parents[1]


def run_of(place: Place, *, overwrite: bool) -> Run:
    """Return the run of a training verb."""
    return Run(
        place.run_folder.path,
        app="diffusion",
        config_path=Path(f"{place.config}.yaml"),
        package="diffusion",
        overwrite=overwrite,
    )


def base_at(base: str | None, place: Place) -> Base:
    """Return the base that an option names; the embedded one if None.

    Raises:
        GatesError: There is none, or it is of another kind.
    """
    if base is None:
        world = World(root_of(place))
        return Base(world.present_base(), world.base_fingerprint)
    folder = Path(base)
    if not folder.is_dir():
        raise GatesError(f"--base is {base}, which is no folder: give that of a pipeline or a base")
    shape_in(folder)
    return Base(folder, digest_of(folder))


def digest_of(path: Path) -> str:
    """Return what tells the content of a file or folder from others."""
    return content_digest(path).sha256[:16]


def table_digest(csv: Path, names: Iterable[str]) -> str:
    """Return what tells a table, and the files that it names, from others."""
    return short_digest(
        {"": digest_of(csv)} | {name: digest_of(csv.parent / name) for name in names}
    )


def zoo_of(world: World, machine: Machine) -> dict[str, Path]:
    """Return the adapters of seed 0, of which one process alone trains those that are missing.

    Raises:
        GatesError: Some are missing, and several processes are asked for.
    """
    world.present_base()
    pieces = [world.adapter_piece(one, 0) for one in world.concepts]
    if machine.processes > 1 and (missing := world.adapters.missing(pieces)):
        raise GatesError(
            f"{len(missing)} adapters of the zoo are missing, such as {missing[0].method}: train "
            "them first with --devices 1"
        )
    return world.zoo(0)
