"""Adapters of a folder of images as pieces of work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning as L

from apps.diffusion.works.base import trainer_of
from diffusion.data.folders import captioned_images
from diffusion.lora_file import LoraBundle
from diffusion.models.adapters import bundle_of, layers_of, trainable_factors
from diffusion.models.codec import EmbeddedCodec, latents_of, load_codec
from diffusion.models.training import FlowMatchingModule, LatentDataModule
from harness.experiment import Job, Piece

ARCHITECTURES = {"flux": "flux-1-dev/lora", "sd3": "stable-diffusion-3-medium/lora"}
EMBEDDED = "flux-tiny/lora"
"""``modelspec.architecture`` of adapters of the embedded base."""

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
        return bundle_of(factors, codec.family, card_of(piece, captions, kind))


def with_trigger(caption: str, trigger: str) -> str:
    """Return a caption with the words of the trigger, which it begins with where it lacks them."""
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return ", ".join(part for part in (trigger, caption) if part)


def card_of(piece: Piece, captions: list[str], architecture: str) -> dict[str, str]:
    """Return the metadata of the file, as other programs read it."""
    counts: dict[str, int] = {}
    for caption in captions:
        for tag in caption.split(","):
            if tag.strip():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + 1
    common = sorted(counts, key=lambda tag: -counts[tag])[:LISTED]
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
        "ss_tag_frequency": json.dumps({piece.method: {tag: counts[tag] for tag in common}}),
    }
    return {name: value for name, value in found.items() if value}
