"""Encoders of adapters as pieces of work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from diffusion.data.concepts import caption_of, concepts, rows_of, styles_of
from diffusion.data.drawings import Drawings
from diffusion.lora_file import FluxShape, load_lora
from diffusion.models.base import EmbeddedBase
from diffusion.models.text import text_encoder
from diffusion.retrieval import (
    Augmentation,
    EncoderConfig,
    Example,
    TrainedEncoder,
    load_encoder,
    save_encoder,
    types_used,
)
from diffusion.retrieval.data import RetrieverData
from diffusion.retrieval.module import LoraRetriever
from harness.experiment import Job, Piece

FOLDER = "encoder"


class EncoderForm:
    """The folder of an encoder, in bfloat16."""

    def save(self, folder: Path, result: TrainedEncoder) -> None:
        """Write it."""
        save_encoder(
            folder / FOLDER,
            result.encoder,
            text_fingerprint=result.text_fingerprint,
            dtype=torch.bfloat16,
        )

    def load(self, folder: Path) -> TrainedEncoder:
        """Read it."""
        return load_encoder(folder / FOLDER)


def captions_of(drawings: Drawings, name: str, part: Any) -> list[str]:
    """Return the captions of a concept in one part."""
    concept = next(one for one in concepts() if one.name == name)
    rows = rows_of(drawings, concept, part)
    return [caption_of(str(text), styles_of(concept)) for text in drawings.captions[rows]]


def examples_of(
    drawings: Drawings, files: Mapping[str, Path], part: Any, most: int
) -> list[Example]:
    """Return adapters with at most so many captions of one part, evenly spread."""
    return [
        Example(load_lora(file), spread(captions_of(drawings, name, part), most), name)
        for name, file in files.items()
    ]


def spread(captions: list[str], most: int) -> list[str]:
    """Return at most so many captions, evenly spread over all."""
    return captions[:: -(-len(captions) // most)]


def shape_of(base: EmbeddedBase) -> FluxShape:
    """Return the shape of the transformer of a base."""
    config = base.transformer.config
    return FluxShape(
        config.num_layers,
        config.num_single_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        context_dim=config.joint_attention_dim,
        pooled_dim=config.pooled_projection_dim,
        guidance=config.guidance_embeds,
    )


def train_encoder(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> TrainedEncoder:
    """Train an encoder on adapters of the zoo and captions that these have seen."""
    L.seed_everything(piece.seed, verbose=False)
    drawings, base = Drawings.load(drawings_folder), EmbeddedBase.load(base_folder)
    text = text_encoder(base.text_encoder["name"])
    known = {name: files[name] for name in piece["concepts"]}
    examples = examples_of(drawings, known, "adapter", piece["captions"])
    shape = shape_of(base)
    used = types_used(shape, [one.bundle for one in examples])
    config = EncoderConfig(shape, types=used, text_dim=text.dim, **piece["encoder"])
    augmentation = Augmentation() if piece["augmented"] else None
    module = LoraRetriever(
        config,
        loss=piece["loss"],
        learning_rate=piece["learning_rate"],
        augmentation=augmentation,
    )
    data = RetrieverData(examples, config, text, steps_per_epoch=piece["steps"])
    job.note(objects=[f"{name}-s0" for name in piece["concepts"]])
    job.fit(module, data, ticks="steps", max_steps=piece["steps"], use_distributed_sampler=False)
    return module.trained(text.fingerprint)
