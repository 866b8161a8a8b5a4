"""The embedded base, a FLUX of 1.5 M parameters for images of 32 by 32, and its folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.models.flow_matching import GUIDANCE
from diffusion.models.text_encoders import TextEncoder, TextStates, text_encoder
from harness.files.atomic import write_json


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Principal components of square patches, as ``FluxPipeline`` expects an autoencoder.

    Latents are the components without whitening; the pipeline multiplies all of them by the one
    ``scaling_factor``.

    Args:
        stride: Side of a patch.
        latent_channels: Components that are kept.
        scaling_factor: Of latents in the model.
        shift_factor: Subtracted from latents before they are scaled.

    Its configuration has ``block_out_channels``, one entry more than the stride has factors of two,
    which is how the pipeline learns the stride.
    """

    @register_to_config
    def __init__(
        self,
        stride: int = 2,
        latent_channels: int = 12,
        scaling_factor: float = 1.0,  # noqa: ARG002 (the pipeline reads both from the configuration)
        shift_factor: float = 0.0,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.register_to_config(block_out_channels=(1,) * stride.bit_length())
        size = 3 * stride**2
        self.mean = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.components = nn.Parameter(torch.eye(latent_channels, size), requires_grad=False)

    @property
    def stride(self) -> int:
        """Pixels of a side of a patch."""
        config: Any = self.config
        return int(config.stride)

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), not scaled, of images (B, 3, H, W) from -1 to 1."""
        stride = self.stride
        patches = nn.functional.unfold(images, stride, stride=stride).transpose(1, 2)
        latents = ((patches - self.mean) @ self.components.T).transpose(1, 2)
        return latents.unflatten(2, (images.shape[2] // stride, images.shape[3] // stride))

    def decode(
        self, z: Tensor, return_dict: bool = True, **_: Any
    ) -> DecoderOutput | tuple[Tensor]:
        """Return images (B, 3, H, W) of latents (B, C, h, w), as a ``DecoderOutput`` or a tuple."""
        stride = self.stride
        patches = z.flatten(2).transpose(1, 2) @ self.components + self.mean
        size = (z.shape[2] * stride, z.shape[3] * stride)
        images = nn.functional.fold(patches.transpose(1, 2), size, stride, stride=stride)
        return DecoderOutput(sample=images) if return_dict else (images,)

    @classmethod
    def fitted(
        cls, images: Tensor, *, stride: int = 2, latent_channels: int = 12
    ) -> "PatchAutoencoder":
        """Return the principal components of images (N, 3, H, W), latents of variance 1 overall."""
        size = 3 * stride**2
        patches = nn.functional.unfold(images.double(), stride, stride=stride)
        flat = patches.transpose(1, 2).reshape(-1, size)
        mean = flat.mean(0)
        centered = flat - mean
        values, vectors = torch.linalg.eigh(centered.T @ centered / len(flat))
        kept = vectors[:, -latent_channels:].flip(1).T
        signs = kept.gather(1, kept.abs().argmax(1, keepdim=True)).sign()
        scale = float(values[-latent_channels:].mean().rsqrt())
        made = cls(stride, latent_channels, scale)
        made.mean.data = mean.float()
        made.components.data = (kept * signs).float()
        return made


TINY: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 30, 30),
}  # arguments of `FluxTransformer2DModel`: width 128, 64 image tokens

UNIT: dict[str, Any] = TINY | {
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}  # the same at width 32 with two blocks, for tests

SHAPES = {"tiny": TINY, "unit": UNIT}


def transformer_of(shape: str) -> Any:
    """Return an untrained transformer of a named shape."""
    return FluxTransformer2DModel(**SHAPES[shape])


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
        shift: Of the times that it is trained and run at, see
            `diffusion.models.flow_matching.shifted`.
        family: Of the transformer.
    """

    transformer: Any
    vae: PatchAutoencoder
    text_encoder: dict[str, str]
    size: int = 32
    shift: float = 3.0
    family: str = "flux"

    def latents(self, images: Tensor) -> Tensor:
        """Return latents (B, C, h, w), scaled as the model sees them.

        Args:
            images: (B, 3, H, W) from -1 to 1.
        """
        config: Any = self.vae.config
        return (self.vae.encode(images) - config.shift_factor) * config.scaling_factor

    def states(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions.

        Raises:
            GatesError: See `encoder`.
        """
        return self.encoder().encode(captions)

    def release(self) -> None:
        """Give up nothing: all is small."""

    def pipeline(self) -> Any:
        """Return the unmodified pipeline of diffusers, which is given states of captions.

        Its prompts are ``prompt_embeds`` and ``pooled_prompt_embeds``, and those of the empty
        caption as negative ones, see `diffusion.models.text_encoders.TextEncoder`.
        """
        pipeline: Any = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self.transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def encoder(self) -> TextEncoder:
        """Return the text encoder of the embedded base.

        Raises:
            GatesError: A package is missing, or holds another text encoder.
        """
        encoder = text_encoder(self.text_encoder["name"])
        self.check_text_encoder(encoder)
        return encoder

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
        guidance: float = GUIDANCE,
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
        config = {"kind": KIND, "size": self.size, "shift": self.shift}
        config["text_encoder"] = self.text_encoder
        write_json(folder / CONFIG, {**config, "transformer": shape, "vae": scaling})

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddedBase":
        """Read what `save` wrote, in float32 and frozen.

        Raises:
            GatesError: The folder holds no such base, or a damaged one.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GatesError(
                f"{folder} holds no embedded base: {CONFIG} is missing or damaged; train one by "
                "`gates diffusion train-base`"
            ) from error
        if not isinstance(config, dict) or config.get("kind") != KIND:
            raise GatesError(f"{folder / CONFIG} does not describe a {KIND}")
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
            shift = float(config.get("shift", 1.0))
            return cls(transformer, vae, dict(config["text_encoder"]), int(config["size"]), shift)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise GatesError(
                f"{folder} holds a damaged base ({type(error).__name__}: {reason}): get it again, "
                "or train it by `gates diffusion train-base`"
            ) from error
