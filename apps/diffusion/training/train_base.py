"""``gates diffusion train-base``: the embedded base, from nothing."""

from functools import partial

from apps.diffusion.embedded_world import obtained, run_of
from apps.diffusion.options import refuse_below, refuse_unless_positive
from apps.diffusion.works.zoo import BaseForm, base_piece, train_base
from core_gates.errors import GatesError, check_option
from diffusion.data.drawings import Drawings
from diffusion.models.embedded_base import SHAPES
from harness.command.verbs import Place


def train(
    place: Place,
    shape: str = "tiny",
    steps: int = 8000,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    text_encoder: str = "minilm",
    drawings: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train the embedded base on the drawings of OpenMoji; a killed training continues.

    Args:
        place: Filled in by the command line.
        shape: Shape of the transformer, ``tiny`` or ``unit``.
        steps: Steps of the training, over which the learning rate falls to 0.
        batch_size: Drawings of a step.
        learning_rate: Learning rate after the warm-up.
        text_encoder: Text encoder, ``minilm`` or, for tests, ``ngrams``.
        drawings: Folder of the drawings; those of the package if null.
        seed: Seed of the weights and of all that is drawn.
        overwrite: Replace a base in the run folder that was trained with other settings.
    """
    check_option("--shape", shape, SHAPES, GatesError)
    refuse_below(1, steps=steps, batch_size=batch_size)
    refuse_unless_positive(learning_rate=learning_rate)
    run = run_of(place, overwrite=overwrite)
    piece = base_piece(
        run,
        seed,
        Drawings.load(drawings),
        shape=shape,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        text_encoder=text_encoder,
    )
    work = partial(train_base, drawings_folder=drawings)
    for path in obtained(run, "bases", BaseForm(), piece, work):
        print(path)
