"""Images that a base makes with adapters, and their judge, as pieces of work."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffusion.data.concepts import (
    SUBJECTS,
    Part,
    base_rows,
    caption_of,
    parts_of,
    rows_of,
    style,
    styles_of,
    subject,
)
from diffusion.data.drawings import STYLES, Drawings, drawn
from diffusion.evaluation.fusion_scores import (
    OTHER,
    PLAIN,
    Judge,
    Judged,
    JudgedDataModule,
    fixed_losses,
)
from diffusion.experiments.combined_losses import MOST, RUN, TIMES, fused, note_trained, seed_of
from diffusion.experiments.trained_gates import Bench
from diffusion.experiments.work import Job
from diffusion.experiments.zoo import images_of
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
    found = []
    with fusion:
        for start in range(0, len(piece["captions"]), BATCH):
            images = base.images(
                states.of(slice(start, start + BATCH)),
                empty,
                seeds=range(start, min(start + BATCH, len(piece["captions"]))),
                steps=piece["steps"],
                guidance=piece["guidance"],
            )
            found.append((images * 255).round().to(torch.uint8))
            job.tick()
    return {"images": torch.cat(found)}


def fused_images(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, Tensor]:
    """Return images of the first drawings of each combination, made and true, uint8.

    Args:
        piece: Its method as for losses, with ``group``, ``part``, ``most``, ``steps`` and
            ``guidance``.
        job: Ticks once a combination.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        trained: Name of a piece -> folder of what was trained for it.
        drawings_folder: Of the drawings.

    Returns:
        ``made`` and ``true`` (P · most, 3, H, W), and ``combination`` (P · most,).
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder, drawings_folder)
    empty = bench.empty()
    made, true, places = [], [], []
    for place, (one, fusion) in enumerate(fused(piece, bench, files, trained)):
        rows = rows_of(bench.drawings, subject(one.subject), piece["part"])[: piece["most"]]
        states = bench.text.encode([one.caption(str(c)) for c in bench.drawings.captions[rows]])
        with nullcontext() if fusion is None else fusion:
            images = bench.base.images(
                states,
                empty,
                seeds=[seed_of(one.name) + number for number in range(len(rows))],
                steps=piece["steps"],
                guidance=piece["guidance"],
                before_step=None if fusion is None else fusion.at,
            )
        made.append((images * 255).round().to(torch.uint8))
        wanted = (images_of(bench.drawings, rows, one.styles) + 1) * 127.5
        true.append(wanted.round().clamp(0, 255).to(torch.uint8))
        places += [place] * len(rows)
        job.tick()
    return {"made": torch.cat(made), "true": torch.cat(true), "combination": torch.tensor(places)}


STYLE_NAMES = (PLAIN, *STYLES)
SUBJECT_NAMES = (OTHER, *SUBJECTS)


class JudgedRows(NamedTuple):
    """Drawings of one part, with the places of their subjects."""

    rows: np.ndarray
    subjects: np.ndarray


def judged_rows(drawings: Drawings, part: Part) -> JudgedRows:
    """Return the drawings of one part that all hands have drawn."""
    others = base_rows(drawings)
    others = others[drawings.whole[others]]
    others = others[parts_of(drawings, others) == part]
    rows, places = [others], [np.zeros(len(others), dtype=np.int64)]
    for place, name in enumerate(SUBJECTS, 1):
        rows.append(rows_of(drawings, subject(name), part))
        places.append(np.full(len(rows[-1]), place))
    return JudgedRows(np.concatenate(rows), np.concatenate(places))


def judged(drawings: Drawings, part: Part) -> Judged:
    """Return all drawings of one part in every style, as uint8."""
    found = judged_rows(drawings, part)
    images, styles, subjects = [], [], []
    for place, name in enumerate(STYLE_NAMES):
        image = drawn(drawings, found.rows, () if name == PLAIN else (name,))
        images.append(torch.from_numpy(np.round(image * 255).clip(0, 255).astype(np.uint8)))
        styles.append(torch.full((len(image),), place))
        subjects.append(torch.from_numpy(found.subjects))
    return Judged(
        torch.cat(images).permute(0, 3, 1, 2).contiguous(), torch.cat(styles), torch.cat(subjects)
    )


def judge_of(weights: dict[str, Tensor]) -> Judge:
    """Return the trained judge."""
    judge = Judge(len(STYLE_NAMES), len(SUBJECT_NAMES))
    judge.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in weights.items()
        }
    )
    return judge.eval()


def train_judge(piece: Piece, job: Job, drawings_folder: str | None = None) -> dict[str, Tensor]:
    """Train the judge on the drawings that adapters are trained on."""
    L.seed_everything(piece.seed, verbose=False)
    drawings = Drawings.load(drawings_folder)
    data = JudgedDataModule(judged(drawings, "adapter"), piece["batch_size"])
    judge = Judge(len(STYLE_NAMES), len(SUBJECT_NAMES), steps=piece["steps"])
    rows = judged_rows(drawings, "adapter").rows
    job.note(objects=[str(code) for code in drawings.hexcodes[rows]])
    job.fit(judge, data, ticks="steps", max_steps=piece["steps"], precision="bf16-mixed")
    return dict(judge.state_dict())


def retained(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, Tensor]:
    """Return how the loss of the concept of each adapter changes when the other one joins it.

    Returns:
        ``ratios`` (P, 2): logarithm of the loss in the fused model over that with the adapter
        alone, of unseen drawings of the subject, then of the style.
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder, drawings_folder)
    model, found = bench.base.transformer, []
    for one, fusion in fused(piece, bench, files, trained):
        ratios = []
        for concept in (subject(one.subject), style(one.styles[0])):
            rows = rows_of(bench.drawings, concept, "test")[:MOST]
            styles = styles_of(concept)
            latents = bench.base.latents(images_of(bench.drawings, rows, styles))
            text = bench.text.encode(
                [caption_of(str(caption), styles) for caption in bench.drawings.captions[rows]]
            )
            alone = make_rival("sum", model, {concept.name: load_lora(files[concept.name])})
            own, both = (
                fixed_losses(
                    model, way, latents, text, steps=TIMES, run=RUN, seed=seed_of(one.name)
                )
                for way in (alone, fusion)
            )
            ratios.append((both.mean() / own.mean()).log())
        found.append(torch.stack(ratios))
        job.tick()
    return {"ratios": torch.stack(found)}
