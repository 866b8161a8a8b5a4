"""A judge of images: style and subject of a drawing, and the drawing that it is nearest to."""

from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

PLAIN = "openmoji"  # the style of drawings without an adapter of a style

OTHER = "other"  # the subject of drawings without an adapter of a subject


class Judged(NamedTuple):
    """Images (B, 3, 32, 32) from 0 to 1 with the places of their styles and subjects (B,)."""

    images: Tensor
    styles: Tensor
    subjects: Tensor


class Judge(L.LightningModule):
    """A convolutional network with a head for the style and one for the subject.

    Args:
        styles: Number of styles.
        subjects: Number of subjects.
        width: Channels of the first layer.
        steps: Steps of the training, over which the learning rate falls linearly to 0.
        learning_rate: Of AdamW.
    """

    def __init__(
        self,
        styles: int,
        subjects: int,
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
        features = widths[-1] * 16
        self.style, self.subject = nn.Linear(features, styles), nn.Linear(features, subjects)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of styles (B, S) and subjects (B, U) of images (B, 3, 32, 32)."""
        features = self.body(images * 2 - 1)
        return self.style(features), self.subject(features)

    def training_step(self, batch: Judged, _: int) -> Tensor:
        """Return both cross-entropies, of images with slight noise."""
        style, subject = self(batch.images + 0.03 * torch.randn_like(batch.images))
        entropy = nn.functional.cross_entropy
        return entropy(style, batch.styles) + entropy(subject, batch.subjects)

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
    def named(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places (B,) of the likeliest style and subject of images."""
        style, subject = self(images)
        return style.argmax(1), subject.argmax(1)


class JudgedDataModule(L.LightningDataModule):
    """Shuffled batches of judged images that are all in memory.

    Args:
        data: All images.
        batch_size: Of training.
    """

    def __init__(self, data: Judged, batch_size: int = 128) -> None:
        super().__init__()
        self.data, self.batch_size = data, batch_size

    def train_dataloader(self) -> DataLoader[Judged]:
        """Return batches in a new order each epoch."""
        data = _Rows(self.data)
        sampler = BatchSampler(RandomSampler(data), self.batch_size, drop_last=True)
        return DataLoader(data, sampler=sampler, batch_size=None)


class _Rows(Dataset[Judged]):
    def __init__(self, data: Judged) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, rows: list[int]) -> Judged:
        images = self.data.images[rows]
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return Judged(images, self.data.styles[rows], self.data.subjects[rows])


def ranks_of(images: Tensor, drawings: Tensor, wanted: Tensor) -> Tensor:
    """Return the rank of the wanted drawing of each image among all, 1 for the nearest.

    Args:
        images: (N, ...) made ones.
        drawings: (M, ...) all drawings.
        wanted: (N,) places of the drawings that the images should show.
    """
    distances = torch.cdist(images.flatten(1).double(), drawings.flatten(1).double())
    return (distances < distances.gather(1, wanted.view(-1, 1))).sum(1) + 1


def pixel_errors(images: Tensor, drawings: Tensor) -> Tensor:
    """Return the root mean squared error (N,) of images from the drawings that they should show."""
    return (images.double() - drawings.double()).square().flatten(1).mean(1).sqrt()
