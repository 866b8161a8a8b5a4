"""Depth as a monocular network returns it: blurred, noisy, inverse, known up to an affine map."""

import torch
from torch import Tensor
from torch.nn import functional as F

from endoscopy.renderer.geometry.rays import FAR

NOISE = 0.03
NEAREST = 1.0


def degrade(depth: Tensor, rng: torch.Generator) -> Tensor:
    """Return the true depth after an unknown affine map of its inverse.

    Args:
        depth: (T, H, W) distance along the ray in mm, zero where there is none.
        rng: For map and noise.

    Returns:
        (T, H, W) in arbitrary units up to `FAR`, zero where there is none.
    """
    present = (depth > 0).float()
    inverse = present / depth.clamp(min=NEAREST)
    blurred = _smooth(inverse) / _smooth(present).clamp(min=1e-6)
    typical = blurred.flatten(1).amax(1).view(-1, 1, 1)
    scale, shift = torch.rand(2, len(depth), 1, 1, generator=rng)
    noise = torch.randn(depth.shape, generator=rng) * NOISE
    mapped = (0.5 + scale) * blurred * (1 + noise) + (0.02 + 0.2 * shift) * typical
    return (1 / mapped.clamp(1 / FAR, 1 / NEAREST)) * present


def _smooth(frames: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel.unsqueeze(0) * kernel.unsqueeze(1)).view(1, 1, 3, 3)
    return F.conv2d(frames.unsqueeze(1), kernel, padding=1).squeeze(1)
