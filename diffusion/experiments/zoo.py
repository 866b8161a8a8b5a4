"""The embedded base and adapters, of its zoo and of folders of images, as pieces of work."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core_gates.errors import GatesError
from diffusion.data.concepts import Concept, concepts
from diffusion.data.pictures import captioned_images, read_image
from diffusion.data.published_table import Load, split_table
from diffusion.data.scenes import (
    WORDINGS,
    Part,
    Scene,
    SceneDataModule,
    images_of,
    scenes,
    spread,
)
from diffusion.data.styles import SIDE
from diffusion.experiments.work import ONE, Job, Machine
from diffusion.library.paths import slug
from diffusion.lora_file import FluxShape, LoraBundle, load_lora, save_lora
from diffusion.models.embedded_base import WEIGHTS, EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.flow_matching import (
    FlowMatchingModule,
    LatentBatch,
    LatentDataModule,
    bundle_of,
    layers_of,
    trainable_factors,
)
from diffusion.models.pipelines import latents_of, load_codec
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


class BaseForm:
    """The folder of an embedded base."""

    def save(self, folder: Path, result: EmbeddedBase) -> None:
        """Write a result to its folder."""
        result.save(folder)

    def load(self, folder: Path) -> EmbeddedBase:
        """Read a result from its folder."""
        return EmbeddedBase.load(folder)


BASE: dict[str, Any] = {
    "shape": "tiny",
    "steps": 8000,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "text_encoder": "minilm",
}  # how the shipped base was trained


def train_base(piece: Piece, job: Job, images: Path | None = None) -> EmbeddedBase:
    """Train the embedded base on the shapes and styles of the base, or on a folder of images."""
    L.seed_everything(piece.seed, verbose=False)
    encoder = text_encoder(piece["text_encoder"])
    named = {"name": piece["text_encoder"], "fingerprint": encoder.fingerprint}
    shown = scenes("adapter")
    given = [] if images is None else captioned_images(images)
    seen = (
        torch.stack([read_image(image.path, SIDE) for image in given])
        if given
        else images_of(shown)
    )
    base = EmbeddedBase(transformer_of(piece["shape"]), PatchAutoencoder.fitted(seen), named)
    data: L.LightningDataModule
    if not given:
        data = scene_data(piece, shown, base)
    else:
        text = encoder.encode([image.caption for image in given])
        rows = [number for number, image in enumerate(given) for _ in range(image.repeats)]
        data = LatentDataModule(base.latents(seen), text, piece["batch_size"], rows)
    module = FlowMatchingModule(
        base.transformer,
        encoder.encode([""]),
        steps=piece["steps"],
        learning_rate=piece["learning_rate"],
        shift=base.shift,
    )
    job.note(scenes=len(seen))
    with sdpa_kernel(SDPBackend.MATH):  # the fastest for 80 tokens on a CPU
        job.fit(module, data, ticks="steps", max_steps=piece["steps"], **trainer_of(piece))
    return base


def scene_data(piece: Piece, found: Sequence[Scene], base: EmbeddedBase) -> SceneDataModule:
    """Return the batches of latents that a piece is trained on, drawn on demand."""
    every = [scene.caption(wording) for scene in found for wording in range(WORDINGS)]
    text = base.encoder().encode(every)

    def make(rows: Tensor, wordings: Tensor, images: Tensor) -> LatentBatch:
        return LatentBatch(base.latents(images), *text.of(rows * WORDINGS + wordings))

    return SceneDataModule(
        found, make, steps=piece["steps"], batch_size=piece["batch_size"], seed=piece.seed or 0
    )


def weights_digest(folder: Path) -> str:
    """Return 16 hexadecimal digits that distinguish the weights of an embedded base."""
    return sha256(folder / WEIGHTS)[:16]


def trainer_of(piece: Piece) -> dict[str, Any]:
    """Return the arguments of the Trainer that a piece asks for."""
    return {"precision": piece.get("precision", "bf16-mixed"), "gradient_clip_val": 1.0}


class AdapterForm:
    """A LoRA file in the names of diffusers, called as its title."""

    def save(self, folder: Path, result: LoraBundle) -> None:
        """Write a result to its folder."""
        name = slug(result.metadata["modelspec.title"])
        save_lora(result, folder / f"{name}.safetensors")

    def load(self, folder: Path) -> LoraBundle:
        """Read a result from its folder.

        Raises:
            GatesError: It is missing or damaged.
        """
        return load_lora(file_in(folder))


def file_in(folder: Path) -> Path:
    """Return the LoRA file in the folder of a piece.

    Raises:
        GatesError: There is none, or more than one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise GatesError(f"{folder} holds {len(files)} adapters, expected one: train it again")
    return files[0]


class ZooForm:
    """A folder of LoRA files in the names of diffusers, called as their concepts."""

    def save(self, folder: Path, result: Mapping[str, LoraBundle]) -> None:
        """Write each adapter to the folder as a LoRA file called by its name."""
        for name, bundle in result.items():
            save_lora(bundle, folder / f"{name}.safetensors")

    def load(self, folder: Path) -> dict[str, LoraBundle]:
        """Read them.

        Raises:
            GatesError: One is damaged.
        """
        return {path.stem: load_lora(path) for path in sorted(folder.glob("*.safetensors"))}


def collect(_: Piece, job: Job, files: Mapping[str, Path]) -> dict[str, LoraBundle]:
    """Return trained adapters by name, as one result."""
    library = {}
    for name, path in files.items():
        library[name] = load_lora(path)
        job.tick()
    return library


def train_adapter(piece: Piece, job: Job, base_folder: Path) -> LoraBundle:
    """Train the adapter of a concept of the zoo."""
    L.seed_everything(piece.seed, verbose=False)
    base = EmbeddedBase.load(base_folder)
    concept = next(candidate for candidate in concepts() if candidate.name == piece.method)
    shown = concept.scenes("adapter")
    job.note(scenes=len(shown))
    layers = piece.get("layers") or layers_of(base.transformer, piece["parts"])
    with trainable_factors(base.transformer, layers, piece["rank"]) as factors:
        module = FlowMatchingModule(
            base.transformer,
            base.encoder().encode([""]),
            factors,
            steps=piece["steps"],
            learning_rate=piece["learning_rate"],
            warmup_steps=piece["warmup_steps"],
            shift=base.shift,
        )
        data = scene_data(piece, shown, base)
        with sdpa_kernel(SDPBackend.MATH):
            job.fit(module, data, ticks="steps", max_steps=piece["steps"], **trainer_of(piece))
        return bundle_of(factors, "flux", card_of(concept, shown))


def card_of(concept: Concept, found: Sequence[Scene]) -> dict[str, str]:
    """Return the metadata of the file of an adapter of the zoo."""
    tags = dict.fromkeys((scene.caption() for scene in spread(found, 20)), 1)
    return {
        "modelspec.title": concept.name,
        "modelspec.architecture": EMBEDDED,
        "modelspec.description": f"{concept.kind} adapter of the embedded base",
        "modelspec.tags": f"{concept.kind}, {concept.name}",
        "modelspec.trigger_phrase": concept.name,
        "modelspec.license": "Apache-2.0",
        "ss_tag_frequency": json.dumps({concept.name: tags}),
    }


ARCHITECTURES = {"flux": "flux-1-dev/lora", "sd3": "stable-diffusion-3-medium/lora"}
EMBEDDED = "flux-tiny/lora"  # `modelspec.architecture` of adapters of the embedded base

WARMUP, LISTED = 5, 200


def train_own_adapter(
    piece: Piece, job: Job, images: Path, base_folder: Path, size: int | None
) -> LoraBundle:
    """Train an adapter on a folder of captioned images."""
    L.seed_everything(piece.seed, verbose=False)
    pictures, codec = captioned_images(images), load_codec(base_folder, size)
    captions = [with_trigger(picture.caption, piece.get("trigger", "")) for picture in pictures]
    rows = [number for number, picture in enumerate(pictures) for _ in range(picture.repeats)]
    text = codec.states(captions)
    latents = latents_of(codec, [picture.path for picture in pictures])
    empty = codec.states([""])
    codec.release()
    data = LatentDataModule(latents, text, piece["batch_size"], rows)
    layers = layers_of(codec.transformer, piece["parts"])
    kind = EMBEDDED if isinstance(codec, EmbeddedBase) else ARCHITECTURES[codec.family]
    job.note(images=len(pictures))
    with trainable_factors(codec.transformer, layers, piece["rank"]) as factors:
        module = FlowMatchingModule(
            codec.transformer,
            empty,
            factors,
            steps=piece["steps"],
            learning_rate=piece["learning_rate"],
            warmup_steps=WARMUP,
            caption_dropout=piece["caption_dropout"],
            shift=codec.shift,
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
    tags = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    card = {
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
    return {name: value for name, value in card.items() if value}


FOLDER = "encoder"
STEPS_PER_EPOCH = 50  # steps after which adapters of a table are validated


class EncoderForm:
    """The folder of an encoder, in bfloat16."""

    def save(self, folder: Path, result: TrainedEncoder) -> None:
        """Write a result to its folder."""
        save_encoder(
            folder / FOLDER,
            result.encoder,
            text_fingerprint=result.text_fingerprint,
            dtype=torch.bfloat16,
        )

    def load(self, folder: Path) -> TrainedEncoder:
        """Read a result from its folder."""
        return load_encoder(folder / FOLDER)


def captions_of(name: str, part: Part, most: int) -> list[str]:
    """Return captions of a concept in one part, at most so many, in all wordings."""
    concept = next(candidate for candidate in concepts() if candidate.name == name)
    shown = spread(concept.scenes(part), most)
    return [scene.caption(number % WORDINGS) for number, scene in enumerate(shown)]


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
    machine: Machine = ONE,
) -> TrainedEncoder:
    """Train an encoder on adapters of the zoo and captions that these have seen."""
    L.seed_everything(piece.seed, verbose=False)
    base = EmbeddedBase.load(base_folder)
    text = text_encoder(base.text_encoder["name"])
    examples = [
        Example(load_lora(files[name]), captions_of(name, "adapter", piece["captions"]), name)
        for name in piece["concepts"]
    ]
    shape = shape_of(base)
    used = types_used(shape, [example.bundle for example in examples])
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
        config = EncoderConfig.published(shape)
        return config if config.out_dim == dim else EncoderConfig.published(shape, text_dim=dim)
    used = types_used(shape, [example.bundle for example in examples])
    return EncoderConfig(shape, types=used, text_dim=dim, **piece["encoder"])


def reader_of(shape: Shape) -> Load:
    """Return a loader that reads adapters of one base and refuses those of others."""
    return partial(load_lora, base=shape.modules())


def fitted(
    piece: Piece,
    job: Job,
    config: EncoderConfig,
    data: RetrieverData,
    machine: Machine,
    **options: Any,
) -> TrainedEncoder:
    """Train an encoder of adapters, and return it."""
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
