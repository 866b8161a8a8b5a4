"""``gates diffusion train-base`` and ``train-lora``: the embedded network, and adapters of it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from apps.diffusion.commands import Precision, refuse_unless_positive, refuse_unless_share
from apps.diffusion.embedded_world import base_at, base_piece, digest_of, obtained, run_of
from core_gates.errors import GatesError, check_option
from diffusion.data.pictures import captioned_images
from diffusion.experiments.work import refuse_below
from diffusion.experiments.zoo import (
    AdapterForm,
    BaseForm,
    file_in,
    train_base,
    train_own_adapter,
)
from diffusion.library.paths import slug
from diffusion.lora_file.container import LIMITS
from diffusion.models.embedded_base import SHAPES
from diffusion.models.flow_matching import PARTS
from harness.command.verbs import Place


def train_embedded(
    place: Place,
    shape: str = "tiny",
    steps: int = 8000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    text_encoder: str = "minilm",
    images: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train the embedded base, on scenes that are drawn on demand or on a folder of images.

    A killed training continues.

    Args:
        place: Filled in by the command line.
        shape: Shape of the transformer, ``tiny`` or ``unit``.
        steps: Steps of the training, over which the learning rate falls to 0.
        batch_size: Images of a step.
        learning_rate: Learning rate after the warm-up.
        text_encoder: Text encoder, ``minilm`` or, for tests, ``ngrams``.
        images: Folder of images with captions, as train-lora takes it, of which the middle squares
            are seen at 32 by 32 pixels; scenes of shapes if null.
        seed: Seed of the weights and of all that is drawn.
        overwrite: Replace a base in the run folder that was trained with other settings.
    """
    check_option("--shape", shape, SHAPES, GatesError)
    refuse_below(1, steps=steps, batch_size=batch_size)
    refuse_unless_positive(learning_rate=learning_rate)
    run, folder = (
        run_of(place, overwrite=overwrite, seed=seed),
        None if images is None else Path(images),
    )
    found = [] if folder is None else captioned_images(folder)
    piece = base_piece(
        run,
        seed,
        shape=shape,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        text_encoder=text_encoder,
        **({} if folder is None else {"images": digest_of(folder), "count": len(found)}),
    )
    work = partial(train_base, images=folder)
    for path in obtained(run, "bases", BaseForm(), piece, work):
        print(path)


@dataclass(frozen=True)
class Card:
    """What the file of an adapter says of it.

    Attributes:
        title: Title of the adapter, which names its file; that of the folder if null.
        trigger: Words that switch it on; captions that lack them begin with them.
        tags: Tags under which it is found.
        license: License of the adapter, such as CC-BY-4.0.
    """

    title: str | None = None
    trigger: str = ""
    tags: tuple[str, ...] = ()
    license: str = ""


@dataclass(frozen=True)
class Training:
    """How an adapter is trained.

    Attributes:
        rank: Rank of the adapter.
        parts: Parts of each block that it changes: ``attention``, ``mlp``, ``modulation``.
        steps: Steps of the training, over which the learning rate falls to 0.
        batch_size: Images of a step.
        learning_rate: Learning rate after the warm-up.
        caption_dropout: Fraction of captions that are left empty.
        precision: Numbers that are computed with.
    """

    rank: int = 4
    parts: tuple[str, ...] = ("attention", "mlp", "modulation")
    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 5e-3
    caption_dropout: float = 0.1
    precision: Precision = "bf16-mixed"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense, or there is no such part of a block.
        """
        refuse_below(1, rank=self.rank, steps=self.steps, batch_size=self.batch_size)
        if self.rank > LIMITS.rank:
            raise GatesError(f"--rank is {self.rank}, expected {LIMITS.rank} or less")
        refuse_unless_positive(learning_rate=self.learning_rate)
        refuse_unless_share(caption_dropout=self.caption_dropout)
        if unknown := sorted(set(self.parts) - PARTS.keys()):
            raise GatesError(f"no part of a block is named {unknown[0]!r}: {', '.join(PARTS)}")

    def settings(self) -> dict[str, Any]:
        """Return all that decides the result."""
        precision = None if self.precision == "bf16-mixed" else self.precision
        return {**vars(self), "parts": list(self.parts), "precision": precision}


def train_adapter(
    place: Place,
    images: list[str],
    card: Card,
    training: Training,
    base: str | None = None,
    size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train an adapter on a folder of captioned IMAGES; a killed training continues.

    The folder holds images with ``.txt`` files of the same name, in folders such as ``10_fruit``
    where they are to be seen ten times an epoch, or a ``metadata.jsonl``.

    Args:
        place: Filled in by the command line.
        images: Folder of images with captions.
        card: What the file says of the adapter.
        training: How it is trained.
        base: Folder of a FLUX or SD3 pipeline of diffusers, or of an embedded base; the one of the
            package if null.
        size: Side of images in pixels; 1024 for pipelines if null.
        seed: Seed of the weights and of all that is drawn.
        overwrite: Replace an adapter in the run folder that was trained with other settings.
    """
    if len(images) != 1:
        raise GatesError(f"expected one folder of images, found {len(images)}: {' '.join(images)}")
    refuse_below(1, size=size)
    folder = Path(images[0])
    found, start = captioned_images(folder), base_at(base, place)
    title = card.title or folder.resolve().name
    run = run_of(place, overwrite=overwrite, seed=seed)
    piece = run.piece(
        slug(title),
        seed,
        title=title,
        trigger=card.trigger or None,
        tags=list(card.tags) or None,
        license=card.license or None,
        images=digest_of(folder),
        count=len(found),
        start=start.digest,
        size=size,
        **training.settings(),
    )
    work = partial(train_own_adapter, images=folder, base_folder=start.folder, size=size)
    for path in obtained(run, "loras", AdapterForm(), piece, work):
        print(file_in(path))
