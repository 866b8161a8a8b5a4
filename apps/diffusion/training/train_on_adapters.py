"""``gates diffusion train-retriever`` and ``train-gates``: what learns from many adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from apps.diffusion.adapter_files import roles_in
from apps.diffusion.commands import Precision, refuse_unless_positive, refuse_unless_share
from apps.diffusion.embedded_world import (
    Base,
    World,
    base_at,
    digest_of,
    obtained,
    root_of,
    run_of,
    table_digest,
    zoo_of,
)
from apps.diffusion.studies.base_study import ENCODER, PUBLISHED, UNSEEN, encoder_of
from core_gates.errors import GatesError
from diffusion.data.published_table import read_rows, split_table
from diffusion.experiments.trained_gates import (
    FILE,
    GatesForm,
    library_of,
    train_gates,
    train_own_gates,
)
from diffusion.experiments.work import Machine, refuse_below
from diffusion.experiments.zoo import (
    FOLDER,
    EncoderForm,
    reader_of,
    train_encoder,
    train_own_encoder,
)
from diffusion.fusion.fusion_tasks import read_target_images
from diffusion.fusion.protocol import ROLES, with_roles
from diffusion.lora_file.recognition import modules_in, shape_in
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

TABLE_ENCODERS = "table_encoders"
"""Folder of encoders of tables, apart from those of the zoo that studies look for."""


@dataclass(frozen=True)
class RetrieverTraining:
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
        precision = None if self.precision == "32-true" else self.precision
        return {**recipe, **given, "precision": precision}


def fit_retriever(
    place: Place,
    training: RetrieverTraining,
    machine: Machine,
    csv: str | None = None,
    base: str | None = None,
    text_encoder: str | None = None,
    held_out_concepts: tuple[str, ...] = UNSEEN,
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
        seed: Seed of the weights and of all that is drawn.
        overwrite: Replace an encoder in the run folder that was trained with other settings.
    """
    if machine.strategy == "fsdp2" and machine.processes > 1:
        raise GatesError("--strategy fsdp2 shards a frozen model, and the retriever has none: ddp")
    run = run_of(place, overwrite=overwrite, seed=seed)
    if csv is not None:
        own = own_piece(run, place, training, machine, Path(csv), base, text_encoder, seed)
        for path in obtained(run, TABLE_ENCODERS, EncoderForm(), *own):
            print(path / FOLDER)
        return
    if base is not None or text_encoder is not None or training.batch_size is not None:
        raise GatesError("--base, --text_encoder and --batch_size need --csv")
    world = World(root_of(place))
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
    places: dict[str, Any] = {"base_folder": folder, "files": files}
    work = partial(train_encoder, machine=machine, **places)
    for path in obtained(run, "encoders", EncoderForm(), piece, work):
        print(path / FOLDER)


def own_piece(
    run: Run,
    place: Place,
    training: RetrieverTraining,
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


TABLE_GATES = "table_gates"
"""Folder of gates of tables, apart from those of the zoo that studies look for."""


@dataclass(frozen=True)
class Gates:
    """What the gates are.

    Attributes:
        what: ``gates``, or ``strengths``: factors of adapters by layer alone.
        variant: Terms of a gate: ``full``, or without those of the base (``no_base``, as
            published), of the adapter (``no_lora``) or of both together (``no_cross``).
        time: How gates learn of the denoising time: by their inputs (``implicit``, as published),
            or by a learned shift as well (``film``).
        initialization: Gates begin as the plain sum of all adapters (``sum``), or at random
            (``published``).
        global_rank: Rank of one more adapter, which is what the others have in common; 0 for none.
        factors: Multiply adapters by factors of the layer before the gate.
        begin: File of gates or strengths to start from.
        role_fraction: Fraction of steps in which the roles of adapters are told to the strengths.
        roles: Roles, such as a:subject,b:style; those that tags name if null.
        switch: Turn adapters off that do not suit a prompt; on the zoo it learns from adapters that
            images do not show.
        encoder: Folder of the encoder that scores adapters for it; that of the zoo if null.
    """

    what: Literal["gates", "strengths"] = "gates"
    variant: Literal["full", "no_base", "no_cross", "no_lora"] = "full"
    time: Literal["implicit", "film"] = "implicit"
    initialization: Literal["sum", "published"] = "sum"
    global_rank: int = 0
    factors: bool = True
    begin: str | None = None
    role_fraction: float = 0.0
    roles: str | None = None
    switch: bool = False
    encoder: str | None = None

    def __post_init__(self) -> None:
        """Check the rank and what factors need.

        Raises:
            GatesError: The rank is negative, or roles are told where there are no factors.
        """
        refuse_below(0, global_rank=self.global_rank)
        if not 0 <= self.role_fraction <= 1 or (
            self.role_fraction and not self.factors and self.what == "gates"
        ):
            raise GatesError(
                f"--role_fraction is {self.role_fraction}, expected 0 to 1, above 0 with --factors"
            )
        if self.roles is not None and not self.role_fraction:
            raise GatesError(
                "--roles needs --role_fraction, the fraction of steps in which they are told"
            )

    @property
    def name(self) -> str:
        """Name in tables, as studies call what they train."""
        own = {"role": self.role_fraction, "switch": self.switch, "global LoRA": self.global_rank}
        parts = [one for one in (self.variant, self.time) if one not in ("full", "implicit")]
        name = "layer_strengths" if self.what == "strengths" else " ".join(["gates", *parts])
        return " + ".join([name, *(part for part, given in own.items() if given)])

    def settings(self) -> dict[str, Any]:
        """Return all that decides the result."""
        own: dict[str, Any] = {
            "told": self.role_fraction or None,
            "switch": self.switch or None,
            "global_rank": self.global_rank or None,
            "roles": self.roles,
        }
        if self.what == "strengths":
            return own | {"mode": "strengths", "weight_rate": None}
        return own | {
            "variant": self.variant,
            "initialization": None if self.initialization == "sum" else self.initialization,
            "factors": self.factors or None,
            "time": None if self.time == "implicit" else self.time,
        }

    def files(self, zoo: World | None) -> dict[str, Path]:
        """Return the files that the training reads, by argument.

        Args:
            zoo: What it trains on; None for a table.

        Raises:
            GatesError: Nothing scores adapters for a switch, or a file does not exist.
        """
        encoder = None if self.encoder is None else Path(self.encoder)
        if self.switch and encoder is None:
            encoder = None if zoo is None else encoder_of(zoo)
            if encoder is None:
                raise GatesError("--switch needs scores of adapters: give --encoder FOLDER")
        given = {"begin": None if self.begin is None else Path(self.begin), "encoder": encoder}
        found = {name: path for name, path in given.items() if path is not None}
        if lacking := [name for name, path in found.items() if not path.exists()]:
            raise GatesError(f"--{lacking[0]} is {found[lacking[0]]}, which does not exist")
        return found


OF_GATES = {"--variant", "--time", "--initialization", "--factors", "--weight_rate"}
# options that strengths by layer do not have


@dataclass(frozen=True)
class GatesTraining:
    """How gates are trained.

    Attributes:
        steps: Steps of the training, over which the learning rate falls to 0.
        batch_size: Images of a step, over all processes.
        learning_rate: Learning rate of AdamW at the start.
        weight_rate: Learning rate of the weights of gates; that of the rest if null.
        schedule: How the learning rate falls: ``linear``, or ``cosine`` as published.
        weight_decay: Decoupled decay of the weights of gates.
        caption_dropout: Fraction of captions that are left empty.
        contrast: Add the published contrastive loss: predictions for captions of other adapters are
            to be worse by the margin.
        margin: Smallest loss that is wanted for such captions; it depends on the scale of latents.
        partners: Other adapters that each adapter of a table is combined with.
        precision: Numbers that are computed with.
    """

    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 2.5e-2
    weight_rate: float | None = None
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
        refuse_unless_positive(
            learning_rate=self.learning_rate,
            margin=self.margin,
            weight_rate=self.weight_rate,
            weight_decay=self.weight_decay or None,
        )
        refuse_unless_share(caption_dropout=self.caption_dropout)

    def settings(self) -> dict[str, Any]:
        """Return all that decides the result on the zoo."""
        found = {**vars(self), "partners": None, "contrast": self.contrast or None}
        usual = {"schedule": "linear", "weight_decay": 0.0, "precision": "bf16-mixed"}
        found |= {name: None for name, value in usual.items() if found[name] == value}
        return found if self.contrast else {**found, "margin": None}


def fit_gates(
    place: Place,
    gates: Gates,
    training: GatesTraining,
    machine: Machine,
    csv: str | None = None,
    base: str | None = None,
    size: int | None = None,
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
        csv: Table with model_file, image_file, text, text_short and text_medium, next to its files.
        base: Folder of a FLUX or SD3 pipeline, or of an embedded base; that of the package if null.
        size: Side of images in pixels; 1024 for pipelines if null.
        seed: Seed of all that is drawn.
        overwrite: Replace gates in the run folder that were trained with other settings.
    """
    if training.batch_size % machine.processes:
        raise GatesError(
            f"--batch_size {training.batch_size} cannot be shared equally by {machine.processes}"
            f" processes: give a multiple of {machine.processes}"
        )
    refuse_below(1, size=size)
    idle = sorted({word.partition("=")[0] for word in place.command.split()} & OF_GATES)
    if gates.what == "strengths" and idle:
        raise GatesError(f"{', '.join(idle)} have no meaning for --what strengths: leave them out")
    if csv is None and (base is not None or size is not None):
        raise GatesError("--base and --size need --csv: the zoo is of the embedded base")
    run = run_of(place, overwrite=overwrite, seed=seed)
    world = World(root_of(place)) if csv is None else None
    given, roles = gates.files(world), roles_in(gates.roles)
    settings = {**training.settings(), **gates.settings()}
    settings |= {name: digest_of(path) for name, path in given.items()}
    if world is not None:
        files, folder = zoo_of(world, machine), world.present_base()
        with_roles(dict.fromkeys(files, ROLES[0]), roles)
        work: Any = partial(train_gates, base_folder=folder, files=files)
        settings |= {"start": world.zoo_digest, "group": "train_useless" if gates.switch else None}
    else:
        found, table = base_at(base, place), Path(str(csv))
        digest = table_digest(table, checked(table, found.folder, roles))
        work = partial(train_own_gates, csv=table, base_folder=found.folder, size=size)
        settings |= {"start": found.digest, "table": digest, "size": size}
        settings["partners"] = training.partners
    piece = run.piece(gates.name, seed, **settings)
    kind = "gates" if csv is None else TABLE_GATES
    work = partial(work, machine=machine, roles=roles, **given)
    for path in obtained(run, kind, GatesForm(), piece, work):
        print(path / FILE)


def checked(csv: Path, base: Path, roles: Mapping[str, str]) -> list[str]:
    """Return the files that a table names, where it can be trained on.

    Args:
        csv: The table.
        base: Folder of the base.
        roles: Of adapters that the table names.

    Raises:
        GatesError: It cannot, such as for a file that is missing or of another base.
    """
    shown = read_target_images(csv)
    library = library_of(shown, csv, modules_in(base))
    with_roles(dict.fromkeys(library, ROLES[0]), roles)
    folder = csv.parent.resolve()
    images = {str(image.relative_to(folder)) for one in shown for image in one.images}
    return [*library, *sorted(images)]
