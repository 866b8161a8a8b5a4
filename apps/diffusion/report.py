"""``gates diffusion report``: the page of a run, with images, gates and scores of its study."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from apps.diffusion.evaluate import STUDIES
from core_gates.errors import GatesError, check_option
from harness.command.configfile import find_config, read_config
from harness.command.verbs import Place

if TYPE_CHECKING:
    from apps.diffusion.world import World
    from harness.experiment import Run
    from harness.report.page import Page

Draw = Callable[["Page"], None]

UNITS = {
    "base": "captions or styles",
    "retrieval": "concepts",
    "fusion": "combinations and seeds",
}
"""Study -> what intervals are drawn from."""


def report(place: Place, study: str | None = None, drawings: str | None = None) -> None:
    """Write the report of a run as one HTML page, with figures as PNG and CSV next to it.

    Nothing is trained: run `evaluate` with the same configuration first.

    Args:
        place: Filled in by the command line.
        study: What the run has shown: base, parity, retrieval or fusion; that of the configuration
            if null.
        drawings: Folder of the drawings; those of the package if null.
    """
    chosen = study or _study(place)
    check_option("--study", chosen, STUDIES, GatesError)
    from apps.diffusion.world import World
    from harness.experiment import Run

    world = World(place.run_folder.path.parents[1], drawings=drawings, quick=True)
    path = Path(f"{place.config}.yaml")
    run = Run(place.run_folder.path, app="diffusion", config_path=path, package="diffusion")
    print(write_report(run, world, chosen))


def write_report(run: Run, world: World, study: str) -> Path:
    """Write ``report.html`` into the run folder, and return it.

    Args:
        run: Of the study.
        world: In which nothing is trained.
        study: Its name.

    Raises:
        GatesError: There are no scores yet, or a file of the run folder is damaged.
    """
    from harness.report.sections import run_page

    others = [] if world.run.folder == run.folder else [world.run.folder]
    first, draw = drawing(study, run, world)
    page = run_page(run, draw, first=first, units=UNITS.get(study, "cases"), others=others)
    return page.write(run.folder / "report.html")


def drawing(study: str, run: Run, world: World) -> tuple[Draw | None, Draw | None]:
    """Return what adds the figures of a study above its scores and below them, if there are any."""
    if study == "base":
        from apps.diffusion.pages.base import add_base

        return partial(add_base, world=world), None
    if study == "retrieval":
        from apps.diffusion.pages.retrieval import add_retrieval

        return None, partial(add_retrieval, world=world)
    if study == "fusion":
        from apps.diffusion.pages.fusion import add_fusion, add_images

        images = partial(add_images, run=run, world=world)
        return images, partial(add_fusion, run=run, world=world)
    return None, None


def _study(place: Place) -> str:
    """Return the study of a configuration."""
    try:
        content = read_config(find_config(place.config, "diffusion"))
    except GatesError:
        return place.config
    section = content.get("evaluate") or {}
    if "study" not in section:
        raise GatesError(
            f"the configuration {place.config} shows nothing: give --config with "
            f"{', '.join(STUDIES)}"
        )
    return str(section["study"])
