"""The training data of the shipped segmenter: rendered frames, whole ones and crops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from endoscopy.renderer.config import Exposure, RendererConfig
from endoscopy.renderer.render import render_object
from endoscopy.segmentation.module import intersection_over_union
from endoscopy.segmentation.segmenter import Segmenter

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
    found = torch.cat([segmenter(batch / 255.0)[:, 0] > 0 for batch in images.split(32)])
    scores = intersection_over_union(found, masks)
    return float(scores[0::2].mean()), float(scores[1::2].mean())
