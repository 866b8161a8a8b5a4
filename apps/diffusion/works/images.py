"""Images that a base makes, alone or with one adapter, as pieces of work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.lora_file import load_lora
from diffusion.models.base import EmbeddedBase
from diffusion.models.text import text_encoder
from harness.experiment import Job, Piece

BATCH = 64


def make_images(
    piece: Piece, job: Job, base_folder: Path, adapters: dict[str, Path]
) -> dict[str, Tensor]:
    """Make an image of each caption of a piece, with the adapter of its method if there is one.

    Returns:
        ``images`` (N, 3, H, W) uint8.
    """
    base = EmbeddedBase.load(base_folder)
    text = text_encoder(base.text_encoder["name"])
    base.check_text_encoder(text)
    states, empty = text.encode(piece["captions"]), text.encode([""])
    file = adapters.get(piece.method)
    fusion = nullcontext() if file is None else GatedFusion(
        base.transformer, {piece.method: load_lora(file)}, mode="sum"
    )  # fmt: skip
    found = []
    with fusion:
        for start in range(0, len(piece["captions"]), BATCH):
            rows = slice(start, start + BATCH)
            images = base.images(
                states.of(rows),
                empty,
                seeds=range(start, min(start + BATCH, len(piece["captions"]))),
                steps=piece["steps"],
                guidance=piece["guidance"],
            )
            found.append((images * 255).round().to(torch.uint8))
            job.tick()
    return {"images": torch.cat(found)}
