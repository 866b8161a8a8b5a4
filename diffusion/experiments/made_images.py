"""Images that a base makes with adapters, and their judge, as pieces of work."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffusion.data.concepts import concepts
from diffusion.data.scenes import Scene, SceneDataModule, images_of, scenes, spread
from diffusion.data.shapes import SHAPES
from diffusion.data.styles import BASE_STYLES, NEW_FILLS, PLAIN, WHOLE
from diffusion.evaluation.fusion_scores import Judge, Judged, fixed_losses
from diffusion.experiments.combined_losses import MOST, RUN, TIMES, fused, note_trained, seed_of
from diffusion.experiments.trained_gates import Bench, captions
from diffusion.experiments.work import Job
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.lora_file import load_lora
from diffusion.models.embedded_base import EmbeddedBase
from diffusion.rivals.registry import make_rival
from harness.files.piece import Piece

BATCH = 64


def make_images(
    piece: Piece, job: Job, base_folder: Path, adapters: dict[str, Path]
) -> dict[str, Tensor]:
    """Make an image of each caption of a piece, with the adapter of its method if there is one.

    Returns:
        ``images`` (N, 3, H, W) uint8.
    """
    base = EmbeddedBase.load(base_folder)
    text = base.encoder()
    states, empty = text.encode(piece["captions"]), text.encode([""])
    file = adapters.get(piece.method)
    fusion = nullcontext() if file is None else GatedFusion(
        base.transformer, {piece.method: load_lora(file)}, mode="sum"
    )  # fmt: skip
    batches = []
    with fusion:
        for start in range(0, len(piece["captions"]), BATCH):
            images = base.images(
                states.of(slice(start, start + BATCH)),
                empty,
                seeds=range(start, min(start + BATCH, len(piece["captions"]))),
                steps=piece["steps"],
                guidance=piece["guidance"],
            )
            batches.append((images * 255).round().to(torch.uint8))
            job.tick()
    return {"images": torch.cat(batches)}


def fused_images(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    encoder: Path | None = None,
) -> dict[str, Tensor]:
    """Return images of the first drawings of each combination, made and true, uint8.

    Args:
        piece: Its method as for losses, with ``group``, ``part``, ``most``, ``steps`` and
            ``guidance``.
        job: Ticks once a combination.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        trained: Name of a piece -> folder of what was trained for it.
        encoder: Folder of the encoder that a switch takes scores from.

    Returns:
        ``made`` and ``true`` (P · most, 3, H, W), and ``combination`` (P · most,).
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder)
    empty = bench.empty()
    made, true, places = [], [], []
    for place, (pair, fusion) in enumerate(fused(piece, bench, files, trained, encoder)):
        shown = prompts(pair.scenes(piece["part"]), piece["most"])
        states = bench.text.encode(captions(shown))
        with nullcontext() if fusion is None else fusion:
            images = bench.base.images(
                states,
                empty,
                seeds=[seed_of(pair.name) + number for number in range(len(shown))],
                steps=piece["steps"],
                guidance=piece["guidance"],
                before_step=None if fusion is None else fusion.at,
            )
        made.append((images * 255).round().to(torch.uint8))
        wanted = (images_of(shown, None) + 1) * 127.5
        true.append(wanted.round().clamp(0, 255).to(torch.uint8))
        places += [place] * len(shown)
        job.tick()
    return {"made": torch.cat(made), "true": torch.cat(true), "combination": torch.tensor(places)}


def prompts(found: Sequence[Scene], count: int) -> list[Scene]:
    """Return so many scenes that images are made of, evenly spread, some several times."""
    rounds = -(-count // len(found))
    return spread([scene for scene in found for _ in range(rounds)], count)


FILLS, WHOLES, SHAPE_NAMES = [*BASE_STYLES, *NEW_FILLS], ["", *WHOLE], list(SHAPES)
"""What the heads of the judge name: the style of the shape, that of the whole image, the shape."""


def labels_of(found: Sequence[Scene]) -> Tensor:
    """Return the places (N, 3) of what scenes show."""
    labels = []
    for scene in found:
        fill = next((name for name in scene.styles if name in FILLS), PLAIN)
        whole = next((name for name in scene.styles if name in WHOLE), "")
        shape = SHAPE_NAMES.index(scene.shape)
        labels.append([FILLS.index(fill), WHOLES.index(whole), shape])
    return torch.tensor(labels)


def judged_right(judge: Judge, images: Tensor, found: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Return whether the judge names style, shape, and both of images (N, 3, H, W) uint8."""
    named, wanted = judge.named(images.float() / 255), labels_of(found)
    style = (named[:, :2] == wanted[:, :2]).all(1)
    shape = named[:, 2] == wanted[:, 2]
    right = {"style_right": style, "shape_right": shape, "both_right": style & shape}
    return {name: value.double().numpy() for name, value in right.items()}


def judge_of(weights: dict[str, Tensor]) -> Judge:
    """Return the trained judge."""
    judge = Judge([len(FILLS), len(WHOLES), len(SHAPE_NAMES)])
    judge.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in weights.items()
        }
    )
    return judge.eval()


SOME = 9  # of so many scenes in a style the judge sees one


def train_judge(piece: Piece, job: Job) -> dict[str, Tensor]:
    """Train the judge on scenes that adapters are trained on, in every style and pair of styles."""
    L.seed_everything(piece.seed, verbose=False)
    styles = [tuple(filter(None, pair)) for pair in product(FILLS, WHOLES)]
    styles += [(name,) for name in (*FILLS, *WHOLE)] * 8  # more than half are in one style
    shown = [
        scene
        for place, style in enumerate(styles)
        for scene in scenes("adapter", SHAPE_NAMES, [style])[place % SOME :: SOME]
    ]
    labels, steps = labels_of(shown), piece["steps"]

    def make(rows: Tensor, _: Tensor, images: Tensor) -> Judged:
        return Judged((images + 1) / 2, labels[rows])

    data = SceneDataModule(shown, make, steps=steps, batch_size=piece["batch_size"])
    judge = Judge([len(FILLS), len(WHOLES), len(SHAPE_NAMES)], steps=steps)
    job.note(scenes=len(shown))
    job.fit(judge, data, ticks="steps", max_steps=steps, precision="bf16-mixed")
    return dict(judge.state_dict())


def retained(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    encoder: Path | None = None,
) -> dict[str, Tensor]:
    """Return how the loss of the concept of each adapter changes when the other one joins it.

    Returns:
        ``ratios`` (P, 2): logarithm of the loss in the fused model over that with the adapter
        alone, of unseen drawings of the subject, then of the style.
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder)
    model, measured = bench.base.transformer, []
    for pair, fusion in fused(piece, bench, files, trained, encoder):
        ratios = []
        for name in pair.adapters[:2]:
            own = next(concept for concept in concepts() if concept.name == name)
            shown = spread(own.scenes("test"), MOST)
            latents = bench.base.latents(images_of(shown))
            text = bench.text.encode(captions(shown))
            alone = make_rival("sum", model, {name: load_lora(files[name])})
            single, both = (
                fixed_losses(
                    model,
                    way,
                    latents,
                    text,
                    steps=TIMES,
                    run=RUN,
                    seed=seed_of(pair.name),
                    shift=bench.base.shift,
                )
                for way in (alone, fusion)
            )
            ratios.append((both.mean() / single.mean()).log())
        measured.append(torch.stack(ratios))
        job.tick()
    return {"ratios": torch.stack(measured)}
