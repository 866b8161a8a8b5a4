"""How well adapters work together: a judge of their images, and losses of flow matching."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from diffusion.fusion.protocol import Fusion
from diffusion.models.flow_matching import Noised, flow_matching_losses, noised, shifted
from diffusion.models.text_encoders import TextStates

JUDGED = 512  # images that are judged at a time


class Judged(NamedTuple):
    """Images (B, 3, 32, 32) from 0 to 1 with the places (B, n) of what they show."""

    images: Tensor
    labels: Tensor


class Judge(L.LightningModule):
    """A convolutional network with a head for each of the things that an image shows.

    Args:
        sizes: Number of names of each thing, such as of shapes.
        width: Channels of the first layer.
        steps: Steps of the training, over which the learning rate falls linearly to 0.
        learning_rate: Of AdamW.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        width: int = 16,
        steps: int = 600,
        learning_rate: float = 3e-3,
    ) -> None:
        super().__init__()
        self.steps, self.learning_rate = steps, learning_rate
        widths = (3, width, 2 * width, 4 * width)
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            blocks += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, stride=2, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*blocks, nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(widths[-1] * 16, size) for size in sizes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits (B, size) of each head for images (B, 3, 32, 32)."""
        features = self.body(images * 2 - 1)
        return [head(features) for head in self.heads]

    def training_step(self, batch: Judged, _: int) -> Tensor:
        """Return the sum of the cross-entropies, of images with slight noise."""
        logits = self(batch.images + 0.03 * torch.randn_like(batch.images))
        pairs = zip(logits, batch.labels.unbind(1), strict=True)
        return torch.stack(
            [nn.functional.cross_entropy(logits, label) for logits, label in pairs]
        ).sum()

    def configure_optimizers(self) -> Any:
        """Return AdamW and a learning rate that falls linearly to 0."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, 1 - step / self.steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @torch.no_grad()
    def named(self, images: Tensor) -> Tensor:
        """Return the places (B, n) of what images most likely show."""
        parts = [
            torch.stack([logits.argmax(1) for logits in self(x)], 1) for x in images.split(JUDGED)
        ]
        return torch.cat(parts)


def pixel_errors(images: Tensor, drawings: Tensor) -> Tensor:
    """Return the root mean squared error (N,) of images from the drawings that they should show."""
    return (images.double() - drawings.double()).square().flatten(1).mean(1).sqrt()


BATCH = 64  # latents at a time


@torch.no_grad()
def fixed_losses(
    transformer: nn.Module,
    fusion: Fusion | None,
    latents: Tensor,
    text: TextStates,
    *,
    steps: int = 8,
    run: int | None = None,
    seed: int = 0,
    shift: float = 1.0,
) -> Tensor:
    """Return the flow-matching loss of each latent (N,), its mean over fixed times.

    Times are the midpoints of the steps of a sampling run, from noise to image, and the fusion is
    told the step that each belongs to. Noise is drawn once for each latent and time, so any method
    with the same seed sees the same.

    Args:
        transformer: A ``FluxTransformer2DModel`` or ``SD3Transformer2DModel``.
        fusion: Adapters of it, attached here unless they are; None for the model alone.
        latents: (N, C, h, w).
        text: Of their N captions.
        steps: Number of times.
        run: Steps of the sampling run, of which the nearest to each time is told; ``steps`` if
            None.
        seed: Of the noise.
        shift: Of the times, see `diffusion.models.flow_matching.shifted`.

    Raises:
        GatesError: There are no steps, or numbers of latents and captions differ.
    """
    if steps < 1 or len(latents) != len(text.pooled):
        raise GatesError(
            f"losses need a step and a caption for each latent, found {steps} steps,"
            f" {len(latents)} latents and {len(text.pooled)} captions"
        )
    total, length = latents.new_zeros(len(latents)), run or steps
    with nullcontext() if fusion is None or fusion.attached else fusion:
        for step, drawn in enumerate(fixed_draws(latents, steps, seed, shift)):
            if fusion is not None:
                fusion.at(int((step + 0.5) * length / steps), length)
            for start in range(0, len(latents), BATCH):
                rows = slice(start, start + BATCH)
                at = Noised(*(part[rows] for part in drawn))
                total[rows] += flow_matching_losses(transformer, at, text.of(rows))
    return total / steps


def fixed_draws(latents: Tensor, steps: int, seed: int, shift: float = 1.0) -> Iterator[Noised]:
    """Yield the noised latents of fixed times, from noise to image.

    Args:
        latents: (N, C, h, w).
        steps: Number of times.
        seed: Of the noise.
        shift: Of the times.
    """
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        time = latents.new_full((len(latents),), 1 - (step + 0.5) / steps)
        yield noised(latents, shifted(time, shift), noise)
