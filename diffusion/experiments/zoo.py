"""The embedded base and adapters, of its zoo and of folders of images, as pieces of work."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.data.concepts import Concept, base_rows, caption_of, concepts, rows_of, styles_of
from diffusion.data.drawings import STYLES, Drawings, drawn
from diffusion.data.pictures import captioned_images
from diffusion.data.published_table import Load, split_table
from diffusion.experiments.work import ONE, Job, Machine
from diffusion.library.paths import slug
from diffusion.lora_file import FluxShape, LoraBundle, load_lora, save_lora
from diffusion.models.embedded_base import WEIGHTS, EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.flow_matching import (
    FlowMatchingModule,
    LatentDataModule,
    bundle_of,
    layers_of,
    trainable_factors,
)
from diffusion.models.pipelines import EmbeddedCodec, latents_of, load_codec
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
from harness.files.digest import sha256
from harness.files.piece import Piece


def images_of(drawings: Drawings, rows: np.ndarray, styles: tuple[str, ...] = ()) -> Tensor:
    """Return drawings (N, 3, H, W) from -1 to 1."""
    return torch.from_numpy(drawn(drawings, rows, styles)).permute(0, 3, 1, 2) * 2 - 1


MIXED = {"precision": "bf16-mixed", "gradient_clip_val": 1.0}


class BaseForm:
    """The folder of an embedded base."""

    def save(self, folder: Path, result: EmbeddedBase) -> None:
        """Write it."""
        result.save(folder)

    def load(self, folder: Path) -> EmbeddedBase:
        """Read it."""
        return EmbeddedBase.load(folder)


BASE: dict[str, Any] = {
    "shape": "tiny",
    "steps": 8000,
    "batch_size": 64,
    "learning_rate": 1.5e-3,
    "text_encoder": "minilm",
}  # how the shipped base was trained


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


LICENSES = {
    "openmoji": "CC-BY-SA-4.0",
    "noto": "CC-BY-SA-4.0, trained on Noto Emoji (Apache-2.0)",
    "twemoji": "CC-BY-SA-4.0, trained on Twemoji (CC-BY-4.0)",
}  # of adapters: the captions and the base come with OpenMoji


class AdapterForm:
    """A LoRA file in the names of diffusers, called as its title."""

    def save(self, folder: Path, result: LoraBundle) -> None:
        """Write it."""
        name = slug(result.metadata["modelspec.title"])
        save_lora(result, folder / f"{name}.safetensors")

    def load(self, folder: Path) -> LoraBundle:
        """Read it.

        Raises:
            GatesError: It is missing or damaged.
        """
        return load_lora(file_in(folder))


def file_in(folder: Path) -> Path:
    """Return the LoRA file in the folder of a piece.

    Raises:
        GatesError: There is none, or more than one.
    """
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise GatesError(f"{folder} holds {len(found)} adapters, expected one: train it again")
    return found[0]


def train_adapter(
    piece: Piece, job: Job, base_folder: Path, drawings_folder: str | None = None
) -> LoraBundle:
    """Train the adapter of a concept of the zoo."""
    L.seed_everything(piece.seed, verbose=False)
    drawings, base = Drawings.load(drawings_folder), EmbeddedBase.load(base_folder)
    encoder = base.encoder()
    concept = next(one for one in concepts() if one.name == piece.method)
    rows, styles = rows_of(drawings, concept, "adapter"), styles_of(concept)
    captions = [caption_of(str(caption), styles) for caption in drawings.captions[rows]]
    data = LatentDataModule(
        base.latents(images_of(drawings, rows, styles)),
        encoder.encode(captions),
        piece["batch_size"],
    )
    job.note(objects=[str(code) for code in drawings.hexcodes[rows]], drawings=len(rows))
    layers = piece.get("layers") or layers_of(base.transformer, piece["parts"])
    with trainable_factors(base.transformer, layers, piece["rank"]) as factors:
        module = FlowMatchingModule(
            base.transformer,
            encoder.encode([""]),
            factors,
            steps=piece["steps"],
            learning_rate=piece["learning_rate"],
            warmup_steps=piece["warmup_steps"],
        )
        job.fit(module, data, ticks="steps", max_steps=piece["steps"], **trainer_of(piece))
        return bundle_of(factors, "flux", card_of(concept, captions))


def card_of(concept: Concept, captions: list[str]) -> dict[str, str]:
    """Return the metadata of the file of an adapter of the zoo."""
    phrase = STYLES[concept.name].phrase if concept.kind == "style" else ""
    found = {
        "modelspec.title": concept.name,
        "modelspec.architecture": "flux-tiny/lora",
        "modelspec.description": f"{concept.kind} adapter of the embedded base",
        "modelspec.tags": f"{concept.kind}, {phrase or concept.name}",
        "modelspec.license": LICENSES.get(concept.name, LICENSES["openmoji"]),
        "ss_tag_frequency": json.dumps({concept.name: dict.fromkeys(captions[:20], 1)}),
    }
    return found | ({"modelspec.trigger_phrase": phrase} if phrase else {})


ARCHITECTURES = {"flux": "flux-1-dev/lora", "sd3": "stable-diffusion-3-medium/lora"}
EMBEDDED = "flux-tiny/lora"  # `modelspec.architecture` of adapters of the embedded base

WARMUP, LISTED = 5, 200


def train_own_adapter(
    piece: Piece, job: Job, images: Path, base_folder: Path, size: int | None
) -> LoraBundle:
    """Train an adapter on a folder of captioned images."""
    L.seed_everything(piece.seed, verbose=False)
    found, codec = captioned_images(images), load_codec(base_folder, size)
    captions = [with_trigger(one.caption, piece.get("trigger", "")) for one in found]
    rows = [number for number, one in enumerate(found) for _ in range(one.repeats)]
    text = codec.states(captions)
    latents = latents_of(codec, [one.path for one in found])
    empty = codec.states([""])
    codec.release()
    data = LatentDataModule(latents, text, piece["batch_size"], rows)
    layers = layers_of(codec.transformer, piece["parts"])
    kind = EMBEDDED if isinstance(codec, EmbeddedCodec) else ARCHITECTURES[codec.family]
    job.note(images=len(found))
    with trainable_factors(codec.transformer, layers, piece["rank"]) as factors:
        module = FlowMatchingModule(
            codec.transformer,
            empty,
            factors,
            steps=piece["steps"],
            learning_rate=piece["learning_rate"],
            warmup_steps=WARMUP,
            caption_dropout=piece["caption_dropout"],
        )
        job.fit(module, data, ticks="steps", max_steps=piece["steps"], **trainer_of(piece))
        return bundle_of(factors, codec.family, own_card_of(piece, captions, kind))


def with_trigger(caption: str, trigger: str) -> str:
    """Return a caption with the words of the trigger, which it begins with where it lacks them."""
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return ", ".join(part for part in (trigger, caption) if part)


def own_card_of(piece: Piece, captions: list[str], architecture: str) -> dict[str, str]:
    """Return the metadata of the file, as other programs read it."""
    tags = Counter(tag.strip() for one in captions for tag in one.split(",") if tag.strip())
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": piece["title"],
        "modelspec.architecture": architecture,
        "modelspec.trigger_phrase": piece.get("trigger", ""),
        "modelspec.tags": ", ".join(piece.get("tags", [])),
        "modelspec.license": piece.get("license", ""),
        "ss_output_name": piece.method,
        "ss_network_dim": str(piece["rank"]),
        "ss_network_alpha": str(piece["rank"]),
        "ss_tag_frequency": json.dumps({piece.method: dict(tags.most_common(LISTED))}),
    }
    return {name: value for name, value in found.items() if value}


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
