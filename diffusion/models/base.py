"""The embedded base: what it is made of, and the folder that holds it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.models.autoencoder import PatchAutoencoder
from diffusion.models.text import TextEncoder, TextStates
from diffusion.models.tiny_flux import pipeline_of
from harness.files.atomic import write_json

WEIGHTS, CONFIG = "result.safetensors", "config.json"
KIND = "gatesuite embedded base"
SHAPE = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
         "in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim",
         "guidance_embeds", "axes_dims_rope")  # fmt: skip


@dataclass
class EmbeddedBase:
    """A small FLUX, its autoencoder and the text encoder that it was trained with.

    Attributes:
        transformer: A ``FluxTransformer2DModel``, whose base classes type checkers do not see.
        vae: Autoencoder of small images.
        text_encoder: Name and fingerprint of its text encoder.
        size: Side of its images, in pixels.
    """

    transformer: Any
    vae: PatchAutoencoder
    text_encoder: dict[str, str]
    size: int = 32

    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the model sees them.

        Args:
            images: (B, 3, H, W) from -1 to 1.
        """
        config: Any = self.vae.config
        return (self.vae.encode(images) - config.shift_factor) * config.scaling_factor

    def pipeline(self) -> Any:
        """Return the unmodified pipeline of diffusers with these parts."""
        return pipeline_of(self.transformer, self.vae)

    def check_text_encoder(self, found: TextEncoder) -> None:
        """Refuse a text encoder that the base was not trained with.

        Raises:
            GatesError: It is another one.
        """
        if found.fingerprint != self.text_encoder["fingerprint"]:
            raise GatesError(
                f"the base was trained with the text encoder {self.text_encoder['name']} "
                f"({self.text_encoder['fingerprint']}), found {type(found).__name__} "
                f"({found.fingerprint}): its images would not follow the prompt; give that one"
            )

    @torch.no_grad()
    def images(
        self,
        text: TextStates,
        empty: TextStates,
        *,
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 3.0,
        before_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Return images (N, 3, H, W) from 0 to 1 of captions, through the pipeline.

        Args:
            text: Of N captions.
            empty: Of the empty caption, for classifier-free guidance.
            seeds: N seeds, one of the noise of each image.
            steps: Of denoising.
            guidance: Scale of classifier-free guidance; 1 is without.
            before_step: Called with the number of each step, from 0, and that of all steps.
        """
        count, channels = len(text.pooled), self.transformer.config.in_channels // 4
        side = self.size // self.vae.stride
        noise = torch.stack(
            [
                torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        pipeline = self.pipeline()

        def after(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if before_step is not None and step + 1 < steps:
                before_step(step + 1, steps)
            return tensors

        if before_step is not None:
            before_step(0, steps)
        made = pipeline(
            prompt_embeds=text.tokens,
            pooled_prompt_embeds=text.pooled,
            negative_prompt_embeds=empty.tokens.expand(count, -1, -1),
            negative_pooled_prompt_embeds=empty.pooled.expand(count, -1),
            true_cfg_scale=guidance,
            num_inference_steps=steps,
            height=self.size,
            width=self.size,
            latents=pipeline._pack_latents(noise, count, channels, side, side),
            output_type="pt",
            callback_on_step_end=after,
        )
        return made.images

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``result.safetensors``, rounded to bfloat16."""
        transformer, vae = self.transformer.config, self.vae.config
        shape = {name: transformer[name] for name in SHAPE}
        scaling = {name: vae[name] for name in ("stride", "latent_channels", "scaling_factor")}
        tensors = {
            f"{part}.{name}": tensor.detach().cpu().bfloat16().contiguous()
            for part, model in (("transformer", self.transformer), ("vae", self.vae))
            for name, tensor in model.state_dict().items()
        }
        save_file(tensors, folder / WEIGHTS)
        found = {"kind": KIND, "size": self.size, "text_encoder": self.text_encoder}
        write_json(folder / CONFIG, {**found, "transformer": shape, "vae": scaling})

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddedBase":
        """Read what :meth:`save` wrote, in float32 and frozen.

        Raises:
            GatesError: The folder holds no such base, or a damaged one.
        """
        folder = Path(folder)
        config = _config_of(folder)
        try:
            tensors = load_file(folder / WEIGHTS)
            transformer: Any = FluxTransformer2DModel(**config["transformer"])
            vae = PatchAutoencoder(**config["vae"])
            for part, model in (("transformer", transformer), ("vae", vae)):
                state = {
                    name.removeprefix(f"{part}."): tensor.float()
                    for name, tensor in tensors.items()
                    if name.startswith(f"{part}.")
                }
                if not all(tensor.isfinite().all() for tensor in state.values()):
                    raise ValueError(f"{part} holds numbers that are not finite")
                model.load_state_dict(state)
                model.eval().requires_grad_(False)
            return cls(transformer, vae, dict(config["text_encoder"]), int(config["size"]))
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise GatesError(
                f"{folder} holds a damaged base ({type(error).__name__}: {reason}): get it again, "
                "or train it by `gates diffusion train-base`"
            ) from error


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GatesError(
            f"{folder} holds no embedded base: {CONFIG} is missing or damaged; train one by "
            "`gates diffusion train-base`"
        ) from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise GatesError(f"{folder / CONFIG} does not describe a {KIND}")
    return found
