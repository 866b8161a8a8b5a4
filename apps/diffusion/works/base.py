"""The embedded base as a piece of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from apps.diffusion.works.pictures import images_of
from diffusion.data.concepts import base_rows, caption_of
from diffusion.data.drawings import Drawings
from diffusion.models.autoencoder import PatchAutoencoder
from diffusion.models.base import WEIGHTS, EmbeddedBase
from diffusion.models.text import text_encoder
from diffusion.models.tiny_flux import transformer_of
from diffusion.models.training import FlowMatchingModule, LatentDataModule
from harness.experiment import Job, Piece
from harness.files.digest import sha256

MIXED = {"precision": "bf16-mixed", "gradient_clip_val": 1.0}


class BaseForm:
    """The folder of an embedded base."""

    def save(self, folder: Path, result: EmbeddedBase) -> None:
        """Write it."""
        result.save(folder)

    def load(self, folder: Path) -> EmbeddedBase:
        """Read it."""
        return EmbeddedBase.load(folder)


def train_base(piece: Piece, job: Job, drawings_folder: str | None = None) -> EmbeddedBase:
    """Train the embedded base on the colored drawings that no subject adapter shares."""
    L.seed_everything(piece.seed, verbose=False)
    drawings, encoder = Drawings.load(drawings_folder), text_encoder(piece["text_encoder"])
    rows = base_rows(drawings)
    if limit := piece.get("drawings"):
        rows = rows[:limit]
    images = images_of(drawings, rows)
    vae = PatchAutoencoder.fitted(images)
    transformer = transformer_of(piece["shape"])
    named = {"name": piece["text_encoder"], "fingerprint": encoder.fingerprint}
    base = EmbeddedBase(transformer, vae, named)
    captions = [caption_of(str(caption)) for caption in drawings.captions[rows]]
    data = LatentDataModule(base.latents(images), encoder.encode(captions), piece["batch_size"])
    module = FlowMatchingModule(
        transformer,
        encoder.encode([""]),
        steps=piece["steps"],
        learning_rate=piece["learning_rate"],
    )
    job.note(objects=[str(code) for code in drawings.hexcodes[rows]], drawings=len(rows))
    job.fit(module, data, ticks="steps", max_steps=piece["steps"], **trainer_of(piece))
    return base


def weights_digest(folder: Path) -> str:
    """Return 16 hexadecimal digits that distinguish the weights of an embedded base."""
    return sha256(folder / WEIGHTS)[:16]


def trainer_of(piece: Piece) -> dict[str, Any]:
    """Return the arguments of the Trainer that a piece asks for."""
    return {**MIXED, "precision": piece.get("precision", "bf16-mixed")}
