"""Gates folded into one static adapter, from runs of a base on some prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.diffusion.works.trained_gates import refuse_gates_of_another
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import MeanGates, bake
from diffusion.fusion.pipeline import AutoLoraPipeline
from diffusion.lora_file import LoraBundle
from diffusion.models.pipelines import load_pipeline


def baked(
    adapters: Mapping[str, LoraBundle],
    strengths: Mapping[str, float],
    base: Path,
    gates: Path,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int,
) -> LoraBundle:
    """Return one adapter with the mean gates of runs of the base in the rows of B.

    Args:
        adapters: Name -> adapter.
        strengths: Name -> strength.
        base: Folder of the base: an embedded one, or a pipeline of diffusers.
        gates: File of trained gates.
        prompts: What is generated while gates are observed.
        steps: Denoising steps of each image.
        seed: Of the noise of the first image; the others follow.

    Raises:
        GatesError: The base cannot be read, or gates or adapters do not fit it.
    """
    refuse_gates_of_another(base, gates)
    pipe, embedded = load_pipeline(base)
    options: dict[str, Any] = {"num_inference_steps": steps}
    if embedded is not None:
        size = embedded.size
        options |= {"text": embedded.encoder(), "height": size, "width": size}
    generate = AutoLoraPipeline(pipe, **options)
    fusion = GatedFusion(pipe.transformer, adapters, gates=gates)
    fusion.set_strengths(strengths)
    with fusion, MeanGates(fusion) as observed:
        for number, prompt in enumerate(prompts):
            generate(prompt, adapters={}, seed=seed + number, output_type="latent")
    return bake(fusion, observed.means)
