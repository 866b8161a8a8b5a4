"""``gates diffusion``: adapters of image models: read, converted, merged, found, fused."""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from core_gates.errors import GatesError, check_option
from harness.command.verbs import FunctionVerb, Place, run_verb

DEFAULT_CONFIG = "embedded"  # of verbs that need no configuration
FUNCTIONS = {
    "train-base": FunctionVerb("apps.diffusion.training.train_lora:train_embedded"),
    "train-lora": FunctionVerb(
        "apps.diffusion.training.train_lora:train_adapter", "images", flat=("card", "training")
    ),
    "train-retriever": FunctionVerb(
        "apps.diffusion.training.train_on_adapters:fit_retriever", flat=("training", "machine")
    ),
    "train-gates": FunctionVerb(
        "apps.diffusion.training.train_on_adapters:fit_gates", flat=("gates", "training", "machine")
    ),
    "evaluate": FunctionVerb("apps.diffusion.commands:evaluate"),
    "generate": FunctionVerb(
        "apps.diffusion.generate:generate", "prompt", flat=("sources", "sampling")
    ),
    "demo": FunctionVerb("apps.diffusion.demo:demo", flat=("sources",)),
    "report": FunctionVerb("apps.diffusion.report:report"),
    "index": FunctionVerb("apps.diffusion.search:index", ("folder",)),
    "search": FunctionVerb("apps.diffusion.search:search", "prompt"),
    "inspect": FunctionVerb("apps.diffusion.inspect:inspect", "paths"),
    "convert": FunctionVerb("apps.diffusion.convert:convert", ("file", "output")),
    "resize": FunctionVerb("apps.diffusion.convert:resize", ("file", "output")),
    "merge": FunctionVerb("apps.diffusion.merge:merge", "files"),
}  # verbs without a Trainer, each imported only when it is called
STUDIES = {
    "base": "apps.diffusion.studies.base_study:base_study",
    "parity": "apps.diffusion.studies.base_study:parity_study",
    "retrieval": "apps.diffusion.studies.base_study:retrieval_study",
    "fusion": "apps.diffusion.studies.fusion_study:fusion_study",
    "images": "apps.diffusion.studies.fusion_study:images_study",
    "retrieved": "apps.diffusion.studies.retrieved_study:retrieved_study",
}  # study -> what shows it
EXTENDED = ("fusion", "embedded")
"""Configurations whose results serve all studies: losses and tuned rivals, and gates that ship."""
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def refuse_unless_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not positive and finite.

    Raises:
        GatesError: One is not.
    """
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise GatesError(f"--{name} is {number}, expected a positive number")


def refuse_unless_share(**numbers: float) -> None:
    """Refuse numbers that are not a fraction.

    Raises:
        GatesError: One does not lie from 0 to below 1.
    """
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise GatesError(f"--{name} is {number}, expected a fraction from 0 to below 1")


def refuse_unless_text(prompt: str) -> None:
    """Refuse a prompt that is not in UTF-8, which no text encoder takes.

    Raises:
        GatesError: There are some.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GatesError(
            f"the prompt is not in UTF-8 at letter {error.start + 1}: write it in UTF-8"
        ) from error


def evaluate(
    place: Place,
    study: str = "base",
    seeds: tuple[int, ...] = (0, 1, 2),
    vectors: str | None = None,
    only: tuple[str, ...] = (),
    quick: bool = False,
    shipped: bool = True,
    overwrite: bool = False,
) -> None:
    """Train what is missing, compare, and write ``scores.json``; a killed evaluation continues.

    Args:
        place: Filled in by the command line.
        study: What is shown: ``base``, ``parity``, ``retrieval``, ``fusion``,
            ``images`` or ``retrieved``.
        seeds: Seeds of what is trained for the study.
        vectors: Folder of the golden vectors, for ``parity``.
        only: Methods that take part; all when empty. Bars need all.
        quick: A quick run: nothing is trained, and there are no bars.
        shipped: Use what ships with the package where its settings agree.
        overwrite: Replace what was made with other settings.
    """
    check_option("study", study, STUDIES, GatesError)
    from apps.diffusion.embedded_world import World
    from apps.diffusion.studies.base_study import Asked

    root = place.run_folder.path.parents[1]
    run = place.run(
        package="diffusion", shipped=shipped, overwrite=overwrite, quick=quick, only=only,
        seeds=seeds, extended=EXTENDED,
    )  # fmt: skip
    world = World(root, shipped=shipped, overwrite=overwrite, quick=quick, command=place.command)
    module, _, name = STUDIES[study].partition(":")
    asked = Asked(run, seeds, Path(vectors) if vectors else None)
    getattr(importlib.import_module(module), name)(asked, world)


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    run_verb("diffusion", FUNCTIONS, arguments, config=DEFAULT_CONFIG)
