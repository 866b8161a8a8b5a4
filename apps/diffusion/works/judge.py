"""The judge of images as a piece of work."""

from __future__ import annotations

from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffusion.data.concepts import SUBJECTS, Part, base_rows, parts_of, rows_of, subject
from diffusion.data.drawings import Drawings
from diffusion.data.styles import STYLES, drawn
from diffusion.evaluation.classifier import OTHER, PLAIN, Judge, Judged, JudgedDataModule
from harness.experiment import Job, Piece

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
