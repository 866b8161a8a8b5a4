"""Training of the segmenter on rendered frames, whole ones and crops."""

from collections.abc import Callable

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from endoscopy.renderer.render import render_object
from endoscopy.renderer.scene import Exposure, RendererConfig
from endoscopy.segmenter import Segmenter

Batch = list[Tensor]  # images (B,3,S,S) uint8, masks (B,S,S) bool


class SegmenterModule(L.LightningModule):
    """Cross-entropy plus soft Dice loss on images of random symmetry, color and sharpness.

    Args:
        segmenter: Network.
        learning_rate: Peak of a one-cycle schedule of AdamW.
        augment: Draw symmetries, colors and blur, so that real frames are less out of distribution.
    """

    def __init__(
        self, segmenter: Segmenter, learning_rate: float = 3e-3, augment: bool = True
    ) -> None:
        super().__init__()
        self.segmenter, self.learning_rate, self.augment = segmenter, learning_rate, augment

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, augmented if asked for."""
        images, masks = batch[0] / 255.0, batch[1].float()
        if self.augment:
            images, masks = augmented(images, masks)
        return segmentation_loss(self.segmenter(images)[:, 0], masks)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Log the mean intersection over union."""
        masks = self.segmenter(batch[0] / 255.0)[:, 0] > 0
        score = intersection_over_union(masks, batch[1]).mean()
        self.log("val/iou", score, prog_bar=True, sync_dist=True, batch_size=len(masks))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        optimizer, schedule = self.optimizer(int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def optimizer(self, steps: int) -> tuple[Optimizer, LRScheduler]:
        """Return the optimizer and its schedule over a number of steps."""
        optimizer = torch.optim.AdamW(self.segmenter.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=max(2, steps), cycle_momentum=False
        )
        return optimizer, schedule


def train_segmenter(
    images: Tensor,
    masks: Tensor,
    *,
    size: int = 96,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    augment: bool = True,
    progress: Callable[[int, float], None] | None = None,
) -> Segmenter:
    """Train a segmenter from scratch on the CPU; the same seed gives the same weights.

    Args:
        images: (N, 3, S, S) uint8; other sizes than ``size`` are resized.
        masks: (N, S, S) boolean; frames without a polyp may be among them.
        size: Side length in pixels, a multiple of 8.
        epochs: Passes over all images.
        batch_size: Images per step.
        learning_rate: Peak learning rate.
        seed: Of weights, order and augmentation.
        augment: See `SegmenterModule`.
        progress: Called after every epoch with its number and mean loss.

    Returns:
        The segmenter, for evaluation.

    Raises:
        ValueError: The shapes of images and masks do not fit.
    """
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]) or not len(images):
        raise ValueError(
            f"images {tuple(images.shape)} and masks {tuple(masks.shape)} must be (N,3,S,S) and "
            "(N,S,S) with N at least 1"
        )
    if images.shape[2:] != (size, size):
        resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        images = resized.round().byte()
        masks = F.interpolate(masks[:, None].float(), (size, size))[:, 0] > 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = SegmenterModule(Segmenter(size), learning_rate, augment)
        order = torch.Generator().manual_seed(seed)
        data = TensorDataset(images, masks)
        loader = DataLoader(data, batch_size, shuffle=True, generator=order)
        optimizer, schedule = module.optimizer(epochs * len(loader))
        for epoch in range(epochs):
            losses = []
            for batch in loader:
                optimizer.zero_grad()
                loss = module.loss(batch)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            if progress is not None:
                progress(epoch, float(torch.stack(losses).mean()))
    return module.segmenter.eval()


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return cross-entropy plus 1 - soft Dice, both averaged over images.

    Args:
        logits: (B, H, W).
        masks: (B, H, W) float.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks)
    chances = logits.sigmoid()
    overlap = 2 * (chances * masks).sum((1, 2)) + 1
    dice = overlap / (chances.sum((1, 2)) + masks.sum((1, 2)) + 1)
    return cross_entropy + (1 - dice).mean()


def intersection_over_union(found: Tensor, masks: Tensor) -> Tensor:
    """Return the intersection over union of boolean masks (B, H, W), 1 where both are empty."""
    both, any_ = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
    return torch.where(any_ > 0, both / any_.clamp(min=1), 1.0)


def augmented(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each image one of the eight symmetries, a gain for each color, and blur.

    Args:
        images: (B, 3, S, S) in [0, 1].
        masks: (B, S, S).
    """
    both = torch.cat([images, masks[:, None]], dim=1)
    symmetry = torch.randint(8, (len(both),))
    turned = torch.empty_like(both)
    for k in range(8):
        chosen = symmetry == k
        part = both[chosen].rot90(k % 4, (2, 3))
        turned[chosen] = part.flip(3) if k >= 4 else part
    images, masks = turned[:, :3], turned[:, 3]
    gain = torch.exp(0.25 * torch.randn(len(images), 3, 1, 1))
    gamma = torch.exp(0.3 * torch.randn(len(images), 1, 1, 1))
    images = (images.clamp(min=0) ** gamma * gain).clamp(0, 1)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(len(images), 1, 1, 1)
    noise = 0.03 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
    return (share * images + (1 - share) * blurred + noise).clamp(0, 1), masks


SIDE = 128  # pixels of a rendered frame
SMALLEST_PART = 0.35  # of a side
TEST_SEED = 99
LEAST_POLYP = 0.6  # fraction of the polyp that a crop must show, unless it shows none


def rendered_masks(
    objects: int, frames: int, *, seed: int, size: int, tick: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Render frames of both endoscopes and exposures, each whole and as a random crop.

    Crops imitate the closer views and the rectangular fields of other endoscopes.

    Args:
        objects: Number of polyps.
        frames: Frames of each.
        seed: Of objects and crops.
        size: Side length in pixels of what is returned.
        tick: Called after every object.

    Returns:
        Images (2N, 3, size, size) uint8 and masks (2N, size, size) bool of N frames.
    """
    generator = np.random.default_rng(seed)
    images, masks = [], []
    for index in range(objects):
        exposure: Exposure = "agc" if index % 2 else "fixed"
        config = RendererConfig(
            seed=seed, side=SIDE, frames=frames, exposure=exposure, depth="none", brand="mixed"
        )
        seen = render_object(config, index)
        for image, mask in zip(seen.images, seen.masks, strict=True):
            for left, top, side in ((0, 0, SIDE), _part(mask.numpy(), generator)):
                window = (..., slice(top, top + side), slice(left, left + side))
                part, of_mask = image[window].float(), mask[window].float()
                images.append(
                    F.interpolate(part[None], (size, size), mode="bilinear", antialias=True)[0]
                )
                masks.append(F.interpolate(of_mask[None, None], (size, size), mode="area")[0, 0])
        tick()
    return torch.stack(images).round().byte(), torch.stack(masks) > 0.5


def _part(mask: np.ndarray, generator: np.random.Generator) -> tuple[int, int, int]:
    """Draw left, top and side of a crop that shows most of the polyp or none of it."""
    whole = mask.sum()
    for _ in range(20):
        side = round(SIDE * generator.uniform(SMALLEST_PART, 0.85))
        left, top = generator.integers(0, SIDE - side + 1, 2)
        share = mask[top : top + side, left : left + side].sum() / whole
        if share >= LEAST_POLYP or (share == 0 and generator.random() < 0.1):
            return int(left), int(top), side
    return 0, 0, SIDE


@torch.no_grad()
def rendered_scores(segmenter: Segmenter, objects: int) -> tuple[float, float]:
    """Return the mean intersection over union on whole frames and on crops of new polyps."""
    images, masks = rendered_masks(objects, 2, seed=TEST_SEED, size=segmenter.size)
    predicted = torch.cat([segmenter(batch / 255.0)[:, 0] > 0 for batch in images.split(32)])
    scores = intersection_over_union(predicted, masks)
    return float(scores[0::2].mean()), float(scores[1::2].mean())
