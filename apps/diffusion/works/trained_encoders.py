"""Encoders of adapters as pieces of work."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from apps.diffusion.options import ONE, Machine
from diffusion.data.concepts import caption_of, concepts, rows_of, styles_of
from diffusion.data.drawings import Drawings
from diffusion.data.published_table import Load, split_table
from diffusion.lora_file import FluxShape, load_lora
from diffusion.models.embedded_base import EmbeddedBase
from diffusion.models.text_encoders import text_encoder
from diffusion.retrieval import (
    EncoderConfig,
    Example,
    TrainedEncoder,
    load_encoder,
    save_encoder,
    types_used,
)
from diffusion.retrieval.encoder_config import Shape
from diffusion.retrieval.retriever import LoraRetriever
from diffusion.retrieval.retriever_data import Augmentation, RetrieverData
from harness.experiment import Job, Piece

FOLDER = "encoder"
STEPS_PER_EPOCH = 50  # steps after which adapters of a table are validated


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
    machine: Machine = ONE,
) -> TrainedEncoder:
    """Train an encoder on adapters of the zoo and captions that these have seen."""
    L.seed_everything(piece.seed, verbose=False)
    drawings, base = Drawings.load(drawings_folder), EmbeddedBase.load(base_folder)
    text = text_encoder(base.text_encoder["name"])
    examples = []
    for name in piece["concepts"]:
        captions = spread(captions_of(drawings, name, "adapter"), piece["captions"])
        examples.append(Example(load_lora(files[name]), captions, name))
    shape = shape_of(base)
    used = types_used(shape, [one.bundle for one in examples])
    config = EncoderConfig(shape, types=used, text_dim=text.dim, **piece["encoder"])
    data = RetrieverData(examples, config, text, steps_per_epoch=piece["steps"])
    job.note(objects=[f"{name}-s0" for name in piece["concepts"]])
    return fitted(piece, job, config, data, machine)


def train_own_encoder(
    piece: Piece, job: Job, csv: Path, shape: Shape, text_name: str, machine: Machine = ONE
) -> TrainedEncoder:
    """Train an encoder on the adapters of a table; the weights with the best validation stay."""
    L.seed_everything(piece.seed, verbose=False)
    text = text_encoder(text_name)
    training, validation = split_table(csv, piece["held_out"], load=reader_of(shape))
    config = config_of(piece, shape, training, text.dim)
    data = RetrieverData(
        training,
        config,
        text,
        validation=validation,
        batch_size=piece.get("batch_size"),
        steps_per_epoch=min(piece["steps"], STEPS_PER_EPOCH),
        in_memory=bool(piece.get("in_memory", True)),
    )
    job.note(adapters=len(training), validated=len(validation))
    monitor = "val_mrr" if validation else None
    return fitted(piece, job, config, data, machine, monitor=monitor, mode="max")


def config_of(piece: Piece, shape: Shape, examples: Sequence[Example], dim: int) -> EncoderConfig:
    """Return the encoder that a piece asks for, on adapters of a table."""
    if piece["recipe"] == "published":
        own = EncoderConfig.published(shape)
        return own if own.out_dim == dim else EncoderConfig.published(shape, text_dim=dim)
    used = types_used(shape, [one.bundle for one in examples])
    return EncoderConfig(shape, types=used, text_dim=dim, **piece["encoder"])


def reader_of(shape: Shape) -> Load:
    """Return what reads adapters of a base, and refuses those of others."""
    return partial(load_lora, base=shape.modules())


def fitted(
    piece: Piece,
    job: Job,
    config: EncoderConfig,
    data: RetrieverData,
    machine: Machine,
    **options: Any,
) -> TrainedEncoder:
    """Return the encoder that is trained on some data."""
    module = LoraRetriever(
        config,
        loss=piece["loss"],
        learning_rate=piece["learning_rate"],
        augmentation=Augmentation() if piece["augmented"] else None,
    )
    options |= machine.trainer() | {"precision": piece.get("precision", "32-true")}
    if machine.processes > 1:
        options["strategy"] = DDPStrategy(find_unused_parameters=True)
    job.fit(module, data, ticks="steps", max_steps=piece["steps"], **options)
    return module.trained(data.text_fingerprint)
