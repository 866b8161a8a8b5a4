"""Gates folded into one static adapter, from runs of a base on some prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apps.diffusion.works.trained_gates import refuse_gates_of_another
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import MeanGates, bake
from diffusion.fusion.pipeline import AutoLoraPipeline
from diffusion.lora_file import LoraBundle
from diffusion.models.pipelines import load_pipeline


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
    refuse_gates_of_another(baking.base, baking.gates)
    pipe, base = load_pipeline(baking.base)
    options: dict[str, Any] = {"num_inference_steps": baking.steps}
    if base is not None:
        options |= {"text": base.encoder(), "height": base.size, "width": base.size}
    generate = AutoLoraPipeline(pipe, **options)
    fusion = GatedFusion(pipe.transformer, adapters, gates=baking.gates)
    fusion.set_strengths(strengths)
    with fusion, MeanGates(fusion) as observed:
        for number, prompt in enumerate(baking.prompts):
            generate(prompt, adapters={}, seed=baking.seed + number, output_type="latent")
    return bake(fusion, observed.means)
