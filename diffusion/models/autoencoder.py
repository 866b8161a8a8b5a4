"""A linear autoencoder of small images: the stand-in for the autoencoder of FLUX."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Principal components of square patches, as ``FluxPipeline`` expects an autoencoder.

    Latents are the components without whitening; the pipeline multiplies all of them by the one
    ``scaling_factor``.

    Args:
        stride: Side of a patch.
        latent_channels: Components that are kept.
        scaling_factor: Of latents in the model.
        shift_factor: Subtracted from latents before they are scaled.
        block_out_channels: Has one entry more than the stride has factors of two, which is how
            the pipeline learns the stride.
    """

    @register_to_config
    def __init__(
        self,
        stride: int = 4,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,  # noqa: ARG002 (the pipeline reads both from the configuration)
        shift_factor: float = 0.0,  # noqa: ARG002
        block_out_channels: tuple[int, ...] = (1, 1, 1),
    ) -> None:
        super().__init__()
        if stride != 2 ** (len(block_out_channels) - 1):
            raise ValueError(
                f"stride {stride} needs {stride.bit_length()} block_out_channels, found "
                f"{len(block_out_channels)}"
            )
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
        found = ((patches - self.mean) @ self.components.T).transpose(1, 2)
        return found.unflatten(2, (images.shape[2] // stride, images.shape[3] // stride))

    def decode(
        self, z: Tensor, return_dict: bool = True, **unused: Any
    ) -> DecoderOutput | tuple[Tensor]:
        """Return images (B, 3, H, W) of latents (B, C, h, w), as a ``DecoderOutput`` or a tuple."""
        del unused
        stride = self.stride
        patches = z.flatten(2).transpose(1, 2) @ self.components + self.mean
        size = (z.shape[2] * stride, z.shape[3] * stride)
        images = nn.functional.fold(patches.transpose(1, 2), size, stride, stride=stride)
        return DecoderOutput(sample=images) if return_dict else (images,)

    @classmethod
    def fitted(
        cls, images: Tensor, *, stride: int = 4, latent_channels: int = 16
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
        blocks = (1,) * stride.bit_length()
        made = cls(stride, latent_channels, scale, 0.0, blocks)
        made.mean.data = mean.float()
        made.components.data = (kept * signs).float()
        return made
