"""``gates diffusion train-retriever``: the encoder that finds adapters by their weights."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from apps.diffusion.commands import Precision, refuse_unless_positive, refuse_unless_share
from apps.diffusion.embedded_world import (
    Base,
    World,
    base_at,
    obtained,
    root_of,
    run_of,
    table_digest,
    zoo_of,
)
from apps.diffusion.studies.retrieval_study import ENCODER, PUBLISHED, UNSEEN
from core_gates.errors import GatesError
from diffusion.data.published_table import read_rows, split_table
from diffusion.experiments.work import Machine, refuse_below
from diffusion.experiments.zoo import (
    FOLDER,
    EncoderForm,
    reader_of,
    train_encoder,
    train_own_encoder,
)
from diffusion.lora_file.recognition import shape_in
from diffusion.models.embedded_base import CONFIG, EmbeddedBase
from diffusion.models.text_encoders import text_encoder as encoder_of_texts
from diffusion.retrieval.encoder_config import SHAPES
from harness.command.verbs import Place
from harness.experiment import Piece, Run

NAMES = {"ours": "encoder", "published": "published loss and mask"}  # recipe -> name in tables

RECIPES = {"ours": ENCODER, "published": PUBLISHED}
TABLE: dict[str, dict[str, Any]] = {
    "ours": {"steps": 2000, "learning_rate": 1e-3, "loss": "contrastive", "augmented": True,
             "encoder": ENCODER["encoder"]},
    "published": {"steps": 2000, "learning_rate": 1e-4, "loss": "published", "augmented": False},
}  # fmt: skip
"""How encoders are trained on a table; the published one has its own sizes."""

OF_TABLES = "table_encoders"
"""Folder of encoders of tables, apart from those of the zoo that studies look for."""


@dataclass(frozen=True)
class Training:
    """How the encoder is trained.

    Attributes:
        recipe: ``ours``, or the ``published`` encoder, loss and mask.
        steps: Steps of the training; those of the recipe if null.
        learning_rate: Largest learning rate of AdamW; that of the recipe if null.
        batch_size: Adapters of a step on each process, for a table; all of them if null.
        augmented: Change adapters at random in training; as the recipe says if null.
        held_out: Fraction of the rows of each adapter of a table that validates; 0 for none.
        in_memory: Keep all adapters in memory; else files are read at each step.
        precision: Numbers that are computed with.
    """

    recipe: Literal["ours", "published"] = "ours"
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    augmented: bool | None = None
    held_out: float = 0.1
    in_memory: bool = True
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        refuse_below(1, steps=self.steps, batch_size=self.batch_size)
        refuse_unless_positive(learning_rate=self.learning_rate)
        refuse_unless_share(held_out=self.held_out)

    def settings(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe with what is given in its place."""
        names = ("steps", "learning_rate", "augmented")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        usual = self.precision == "32-true"
        return {**recipe, **given, "precision": None if usual else self.precision}


def train(
    place: Place,
    training: Training,
    machine: Machine,
    csv: str | None = None,
    base: str | None = None,
    text_encoder: str | None = None,
    held_out_concepts: tuple[str, ...] = UNSEEN,
    drawings: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train the encoder that puts adapters where captions of their images lie.

    Without a table it trains on the embedded zoo. A killed training continues.

    Args:
        place: Filled in by the command line.
        training: How it is trained.
        machine: Where it is trained.
        csv: Table with the columns model_file, image_file, text, text_short and text_medium; its
            adapters lie in its folder.
        base: What adapters of the table are for: flux, sd3, or the folder of a model; the embedded
            base if null.
        text_encoder: Text encoder whose space adapters are put into: minilm, or the folder of a
            pipeline with CLIP; that of the base if null.
        held_out_concepts: Concepts of the zoo that are not trained on.
        drawings: Folder of the drawings; those of the package if null.
        seed: Seed of the weights and of all that is drawn.
        overwrite: Replace an encoder in the run folder that was trained with other settings.
    """
    if machine.strategy == "fsdp2" and machine.processes > 1:
        raise GatesError("--strategy fsdp2 shards a frozen model, and the retriever has none: ddp")
    run = run_of(place, overwrite=overwrite)
    if csv is not None:
        own = own_piece(run, place, training, machine, Path(csv), base, text_encoder, seed)
        for path in obtained(run, OF_TABLES, EncoderForm(), *own):
            print(path / FOLDER)
        return
    if base is not None or text_encoder is not None or training.batch_size is not None:
        raise GatesError("--base, --text_encoder and --batch_size need --csv")
    world = World(root_of(place), drawings=drawings)
    known = [one.name for one in world.concepts]
    if unknown := [name for name in held_out_concepts if name not in known]:
        raise GatesError(f"no concept is named {unknown[0]!r}: {', '.join(known)}")
    piece = run.piece(
        NAMES[training.recipe],
        seed,
        start=world.zoo_digest,
        concepts=[name for name in known if name not in held_out_concepts],
        **training.settings(RECIPES[training.recipe]),
    )
    files, folder = zoo_of(world, machine), world.present_base()
    places: dict[str, Any] = {"base_folder": folder, "files": files, "drawings_folder": drawings}
    work = partial(train_encoder, machine=machine, **places)
    for path in obtained(run, "encoders", EncoderForm(), piece, work):
        print(path / FOLDER)


def own_piece(
    run: Run,
    place: Place,
    training: Training,
    machine: Machine,
    csv: Path,
    base: str | None,
    text: str | None,
    seed: int,
) -> tuple[Piece, Any]:
    """Return the piece that an encoder of a table is, and what trains it.

    Raises:
        GatesError: The table cannot be trained on, such as for an adapter of another base.
    """
    found = None if base in SHAPES else base_at(base, place)
    shape = SHAPES[base or ""]() if found is None else shape_in(found.folder)
    name = text or text_of(found, str(base))
    examples, _ = split_table(csv, training.held_out, load=reader_of(shape))
    if len({one.concept for one in examples}) < 2:
        raise GatesError(
            f"{csv} has adapters of one concept: an encoder learns to distinguish them, so give "
            "rows of two at least"
        )
    files = {row.model_file for row in read_rows(csv)}
    several = machine.processes if training.batch_size is not None else 1
    piece = run.piece(
        NAMES[training.recipe],
        seed,
        recipe=training.recipe,
        base=dict(shape._asdict()),
        text=encoder_of_texts(name).fingerprint,
        table=table_digest(csv, files),
        batch_size=training.batch_size,
        processes=None if several == 1 else several,
        held_out=training.held_out,
        in_memory=None if training.in_memory else False,
        **training.settings(TABLE[training.recipe]),
    )
    work = partial(train_own_encoder, csv=csv, shape=shape, text_name=name, machine=machine)
    return piece, work


def text_of(base: Base | None, name: str) -> str:
    """Return the name or folder of the text encoder of a base.

    Raises:
        GatesError: It has none.
    """
    if base is not None and (base.folder / "text_encoder").is_dir():
        return str(base.folder)
    if base is not None and (base.folder / CONFIG).is_file():
        return EmbeddedBase.load(base.folder).text_encoder["name"]
    raise GatesError(f"--base {name} has no text encoder: give --text_encoder")
