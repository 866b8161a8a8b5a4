"""``gates diffusion train-lora``: an adapter of a folder of captioned images."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from apps.diffusion.works.adapter import AdapterForm
from apps.diffusion.works.base import trainer_of
from apps.diffusion.world import World
from core_gates.errors import GatesError
from diffusion.data.folders import captioned_images, read_image
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.container.text import plain_name
from diffusion.models.adapters import bundle_of, layers_of, trainable_factors
from diffusion.models.codec import Codec, EmbeddedCodec
from diffusion.models.training import FlowMatchingModule, LatentDataModule
from harness.command.verbs import Place
from harness.experiment import Job, Piece, Run
from harness.files import content_digest


def train(
    place: Place,
    images: str,
    title: str | None = None,
    base: str | None = None,
    rank: int = 4,
    parts: tuple[str, ...] = ("attention", "mlp", "modulation"),
    steps: int = 100,
    batch_size: int = 32,
    learning_rate: float = 5e-3,
    caption_dropout: float = 0.1,
    license: str = "",
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train an adapter on a folder of captioned images; a killed training continues.

    The folder holds images with ``.txt`` files of the same name, in folders such as ``10_fruit``
    where they are to be seen ten times an epoch, or a ``metadata.jsonl``.

    Args:
        place: Filled in by the command line.
        images: Folder of the images.
        title: Title of the adapter, which names its file; that of the folder if null.
        base: Folder of the base; the embedded one if null.
        rank: Rank of the adapter.
        parts: Parts of each block that it changes: ``attention``, ``mlp``, ``modulation``.
        steps: Steps of the training, over which the learning rate falls to 0.
        batch_size: Images of a step.
        learning_rate: Learning rate after the warm-up.
        caption_dropout: Fraction of captions that are left empty.
        license: License of the adapter, for its file.
        seed: Seed of the weights and of all that is drawn.
        overwrite: Replace an adapter in the run folder that was trained with other settings.
    """
    if rank < 1 or steps < 1 or batch_size < 1:
        raise GatesError(f"rank {rank}, steps {steps}, batch_size {batch_size} must be at least 1")
    folder = Path(images)
    found = captioned_images(folder)
    run = Run(place.run_folder.path, app="diffusion", package="diffusion", overwrite=overwrite)
    named = plain_name(title or folder.resolve().name)
    piece = run.piece(
        named,
        seed,
        images=content_digest(folder).sha256[:16],
        count=len(found),
        start=base_digest(base, place),
        rank=rank,
        parts=list(parts),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        caption_dropout=caption_dropout,
        license=license or None,
    )
    store = run.store("adapters", AdapterForm())
    root = str(place.run_folder.path.parents[1])
    run.obtain(store, [piece], partial(train_on_folder, images=folder, base=base, root=root),
               ticks=steps)  # fmt: skip
    path = store.find(piece)
    assert path is not None
    print(next(iter(sorted(path.glob("*.safetensors")))))


def base_digest(base: str | None, place: Place) -> str:
    """Return what tells a base from others: the embedded one by its piece, another by its files."""
    if base is None:
        return World(place.run_folder.path.parents[1]).base_fingerprint
    return content_digest(Path(base)).sha256[:16]


def codec_of(base: str | None, root: str) -> Codec:
    """Return images and captions as a base sees them."""
    if base is None:
        world = World(root)
        return EmbeddedCodec(world.base, world.text)
    from diffusion.models.loading import load_codec

    return load_codec(base)


def train_on_folder(
    piece: Piece, job: Job, images: Path, base: str | None, root: str
) -> LoraBundle:
    """Train an adapter on a folder."""
    L.seed_everything(piece.seed, verbose=False)
    found, codec = captioned_images(images), codec_of(base, root)
    rows = [number for number, one in enumerate(found) for _ in range(one.repeats)]
    pixels = torch.stack([read_image(one.path, codec.size) for one in found])
    text = codec.states([one.caption for one in found])
    data = LatentDataModule(codec.latents(pixels)[rows], text[rows], piece["batch_size"])
    layers = layers_of(codec.transformer, piece["parts"])
    with trainable_factors(codec.transformer, layers, piece["rank"]) as factors:
        module = FlowMatchingModule(
            codec.transformer,
            codec.states([""]),
            factors,
            steps=piece["steps"],
            learning_rate=piece["learning_rate"],
            warmup_steps=5,
            caption_dropout=piece["caption_dropout"],
        )
        job.fit(module, data, ticks="steps", max_steps=piece["steps"], **trainer_of(piece))
        return bundle_of(factors, codec.family, _card(piece, [one.caption for one in found]))


def _card(piece: Piece, captions: list[str]) -> dict[str, Any]:
    counts = {caption: captions.count(caption) for caption in captions[:200]}
    found = {
        "modelspec.title": piece.method,
        "modelspec.architecture": "flux/lora",
        "modelspec.license": piece.get("license", ""),
        "ss_tag_frequency": json.dumps({piece.method: counts}),
    }
    return {name: value for name, value in found.items() if value}
