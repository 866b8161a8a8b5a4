"""``gates diffusion train-gates``: the gates of several adapters at once."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from apps.diffusion.commands import Precision, refuse_unless_positive, refuse_unless_share
from apps.diffusion.embedded_world import (
    World,
    base_at,
    obtained,
    root_of,
    run_of,
    table_digest,
    zoo_of,
)
from core_gates.errors import GatesError
from diffusion.experiments.trained_gates import (
    FILE,
    GatesForm,
    library_of,
    train_gates,
    train_own_gates,
)
from diffusion.experiments.work import Machine, refuse_below
from diffusion.fusion.fusion_tasks import read_shown
from diffusion.lora_file.recognition import modules_in
from harness.command.verbs import Place

OF_TABLES = "table_gates"
"""Folder of gates of tables, apart from those of the zoo that studies look for."""


@dataclass(frozen=True)
class Gates:
    """What the gates are.

    Attributes:
        variant: Terms of a gate: ``full``, or without those of the base (``no_base``, as
            published), of the adapter (``no_lora``) or of both together (``no_cross``).
        time: How gates learn of the denoising time: by their inputs (``implicit``, as published),
            or by a learned shift as well (``film``).
        initialization: Gates begin as the plain sum of all adapters (``sum``), or at random
            (``published``).
        global_rank: Rank of one more adapter, which is what the others have in common; 0 for none.
    """

    variant: Literal["full", "no_base", "no_cross", "no_lora"] = "full"
    time: Literal["implicit", "film"] = "implicit"
    initialization: Literal["sum", "published"] = "sum"
    global_rank: int = 0

    def __post_init__(self) -> None:
        """Check the rank.

        Raises:
            GatesError: It is negative.
        """
        refuse_below(0, global_rank=self.global_rank)

    @property
    def name(self) -> str:
        """Name in tables."""
        parts = ["gates"]
        parts += [one for one in (self.variant, self.time) if one not in ("full", "implicit")]
        return " ".join(parts) + (" + global LoRA" if self.global_rank else "")

    def settings(self) -> dict[str, Any]:
        """Return all that decides the result."""
        begin = None if self.initialization == "sum" else self.initialization
        own = {"initialization": begin, "global_rank": self.global_rank or None}
        return {"variant": self.variant, "time": self.time, **own}


@dataclass(frozen=True)
class Training:
    """How gates are trained.

    Attributes:
        steps: Steps of the training, over which the learning rate falls to 0.
        batch_size: Images of a step, over all processes.
        learning_rate: Learning rate of AdamW at the start.
        schedule: How the learning rate falls: ``linear``, or ``cosine`` as published.
        weight_decay: Decoupled decay of the weights of gates.
        caption_dropout: Fraction of captions that are left empty.
        contrast: Captions of other adapters are to be off, as published.
        margin: Loss that is wanted of them at least; it depends on the scale of latents.
        partners: Other adapters that each adapter of a table is combined with.
        precision: Numbers that are computed with.
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 2e-2
    schedule: Literal["linear", "cosine"] = "linear"
    weight_decay: float = 0.0
    caption_dropout: float = 0.1
    contrast: bool = False
    margin: float = 0.5
    partners: int = 8
    precision: Precision = "bf16-mixed"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        refuse_below(1, steps=self.steps, batch_size=self.batch_size, partners=self.partners)
        refuse_unless_positive(learning_rate=self.learning_rate, margin=self.margin)
        refuse_unless_positive(weight_decay=self.weight_decay or None)
        refuse_unless_share(caption_dropout=self.caption_dropout)

    def settings(self) -> dict[str, Any]:
        """Return all that decides the result on the zoo."""
        found = {**vars(self), "partners": None, "contrast": self.contrast or None}
        usual = {"schedule": "linear", "weight_decay": 0.0, "precision": "bf16-mixed"}
        found |= {name: None for name, value in usual.items() if found[name] == value}
        return found if self.contrast else {**found, "margin": None}


def train(
    place: Place,
    gates: Gates,
    training: Training,
    machine: Machine,
    csv: str | None = None,
    base: str | None = None,
    size: int | None = None,
    drawings: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train gates that weigh several adapters; a killed training continues.

    Without a table it trains on pairs and triples of the embedded zoo. In a table each row names an
    image, its captions and the adapter that made it, or several as ``a.safetensors;b.safetensors``;
    adapters that are alone are combined, as published.

    Args:
        place: Filled in by the command line.
        gates: What the gates are.
        training: How they are trained.
        machine: Where they are trained.
        csv: Table with the columns model_file, image_file, text, text_short and text_medium; its
            files lie in its folder.
        base: Folder of a FLUX or SD3 pipeline of diffusers, or of an embedded base; the one of the
            package if null.
        size: Side of images in pixels; 1024 for pipelines if null.
        drawings: Folder of the drawings; those of the package if null.
        seed: Seed of all that is drawn.
        overwrite: Replace gates in the run folder that were trained with other settings.
    """
    machine.check_share(training.batch_size)
    refuse_below(1, size=size)
    if csv is None and (base is not None or size is not None):
        raise GatesError("--base and --size need --csv: the zoo is of the embedded base")
    run = run_of(place, overwrite=overwrite)
    settings = {**gates.settings(), **training.settings()}
    if csv is None:
        world = World(root_of(place), drawings=drawings)
        files, folder = zoo_of(world, machine), world.present_base()
        work = partial(train_gates, base_folder=folder, files=files, drawings_folder=drawings)
        settings |= {"start": world.gates_start}
    else:
        found = base_at(base, place)
        table = Path(csv)
        digest = table_digest(table, checked(table, found.folder))
        work = partial(train_own_gates, csv=table, base_folder=found.folder, size=size)
        settings |= {"start": found.digest, "table": digest, "size": size}
        settings["partners"] = training.partners
    piece = run.piece(gates.name, seed, **settings)
    kind, work = "gates" if csv is None else OF_TABLES, partial(work, machine=machine)
    for path in obtained(run, kind, GatesForm(), piece, work):
        print(path / FILE)


def checked(csv: Path, base: Path) -> list[str]:
    """Return the files that a table names, where it can be trained on.

    Raises:
        GatesError: It cannot, such as for a file that is missing or of another base.
    """
    shown = read_shown(csv)
    library = library_of(shown, csv, modules_in(base))
    folder = csv.parent.resolve()
    images = {str(image.relative_to(folder)) for one in shown for image in one.images}
    return [*library, *sorted(images)]
