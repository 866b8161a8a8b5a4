"""``gates diffusion evaluate``: one study a configuration."""

import importlib
from pathlib import Path

from core_gates.errors import GatesError, check_option
from harness.command.verbs import Place

STUDIES = {
    "base": "apps.diffusion.studies.base_study:base_study",
    "parity": "apps.diffusion.studies.base_study:parity_study",
    "retrieval": "apps.diffusion.studies.retrieval_study:retrieval_study",
    "fusion": "apps.diffusion.studies.fusion_study:fusion_study",
}  # study -> what shows it


def evaluate(
    place: Place,
    study: str = "base",
    seeds: tuple[int, ...] = (0, 1, 2),
    drawings: str | None = None,
    vectors: str | None = None,
    only: tuple[str, ...] = (),
    quick: bool = False,
    shipped: bool = True,
    overwrite: bool = False,
) -> None:
    """Train what is missing, compare, and write ``scores.json``; a killed evaluation continues.

    Args:
        place: Filled in by the command line.
        study: What is shown: ``base``, ``parity``, ``retrieval`` or ``fusion``.
        seeds: Seeds of what is trained for the study.
        drawings: Folder of the drawings; those of the package if null.
        vectors: Folder of the golden vectors, for ``parity``.
        only: Methods that take part; all when empty. Bars need all.
        quick: A quick run: nothing is trained, and there are no bars.
        shipped: Use what ships with the package where its settings agree.
        overwrite: Replace what was made with other settings.
    """
    check_option("study", study, STUDIES, GatesError)
    from apps.diffusion.embedded_world import World
    from apps.diffusion.studies.base_study import Asked
    from harness.experiment import Run

    root = place.run_folder.path.parents[1]
    run = Run(
        place.run_folder.path,
        app="diffusion",
        config_path=place.config_path,
        package="diffusion",
        shipped=shipped,
        overwrite=overwrite,
        quick=quick,
        only=only,
        seeds=seeds,
    )
    world = World(root, drawings=drawings, shipped=shipped, overwrite=overwrite, quick=quick)
    module, _, name = STUDIES[study].partition(":")
    asked = Asked(run, seeds, Path(vectors) if vectors else None)
    getattr(importlib.import_module(module), name)(asked, world)
