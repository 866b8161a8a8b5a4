"""Adapters of the zoo as pieces of work."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from apps.diffusion.works.base import trainer_of
from apps.diffusion.works.pictures import images_of
from core_gates.errors import GatesError
from diffusion.data.concepts import Concept, caption_of, concepts, rows_of, styles_of
from diffusion.data.drawings import Drawings
from diffusion.data.styles import STYLES
from diffusion.library.paths import slug
from diffusion.lora_file import LoraBundle, load_lora, save_lora
from diffusion.models.adapters import bundle_of, layers_of, trainable_factors
from diffusion.models.base import EmbeddedBase
from diffusion.models.text import text_encoder
from diffusion.models.training import FlowMatchingModule, LatentDataModule
from harness.experiment import Job, Piece

LICENSES = {
    "openmoji": "CC-BY-SA-4.0",
    "noto": "CC-BY-SA-4.0, trained on Noto Emoji (Apache-2.0)",
    "twemoji": "CC-BY-SA-4.0, trained on Twemoji (CC-BY-4.0)",
}
"""Of adapters: the captions and the base come with OpenMoji."""


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
    encoder = text_encoder(base.text_encoder["name"])
    base.check_text_encoder(encoder)
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
