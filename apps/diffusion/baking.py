"""Gates folded into one static adapter, from runs of a base on some prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from core_gates.errors import GatesError, MissingExtraError
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import MeanGates, bake
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.family.config import is_embedded


class Baking(NamedTuple):
    """What gates are observed on.

    Attributes:
        base: Folder of the base: an embedded one, or a pipeline of diffusers.
        gates: File of trained gates.
        prompts: What is generated.
        steps: Denoising steps of each image.
        seed: Of the noise of the first image; the others follow.
    """

    base: Path
    gates: Path
    prompts: Sequence[str]
    steps: int
    seed: int


class Base(NamedTuple):
    """A model that can run.

    Attributes:
        transformer: What adapters change.
        run: Generates an image per prompt.
    """

    transformer: nn.Module
    run: Callable[[], object]


def baked(
    adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float], baking: Baking
) -> LoraBundle:
    """Return one adapter with the mean gates of runs of the base in the rows of B.

    Args:
        adapters: Name -> adapter.
        strengths: Name -> strength.
        baking: The base, the gates and the prompts.

    Raises:
        GatesError: The base cannot be read, or gates or adapters do not fit it.
    """
    base = _embedded(baking) if is_embedded(baking.base) else _pipeline(baking)
    fusion = GatedFusion(base.transformer, adapters, gates=baking.gates)
    fusion.set_strengths(strengths)
    with fusion, MeanGates(fusion) as observed, torch.inference_mode():
        base.run()
    return bake(fusion, observed.means)


def _embedded(baking: Baking) -> Base:
    from diffusion.models.base import EmbeddedBase
    from diffusion.models.text import text_encoder

    base = EmbeddedBase.load(baking.base)
    encoder = text_encoder(base.text_encoder["name"])
    base.check_text_encoder(encoder)
    text, empty = encoder.encode(list(baking.prompts)), encoder.encode([""])
    seeds = range(baking.seed, baking.seed + len(baking.prompts))
    return Base(
        cast(nn.Module, base.transformer),
        lambda: base.images(text, empty, seeds=list(seeds), steps=baking.steps),
    )


def _pipeline(baking: Baking) -> Base:
    try:
        from diffusers import DiffusionPipeline
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusion", error.name or "diffusers") from error
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            baking.base, local_files_only=True, use_safetensors=True, torch_dtype="auto"
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise GatesError(f"{baking.base} holds no pipeline of diffusers: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)

    def run() -> None:
        for number, prompt in enumerate(baking.prompts):
            generator = torch.Generator().manual_seed(baking.seed + number)
            pipeline(
                prompt,
                num_inference_steps=baking.steps,
                generator=generator,
                output_type="latent",
            )

    return Base(pipeline.transformer, run)
