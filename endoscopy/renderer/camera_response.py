"""From radiance to the picture: vignetting, motion blur, exposure, noise, tone curve, gamma."""

import math

import torch
from torch import Tensor

from endoscopy.renderer.brand import Brand
from endoscopy.renderer.config import Exposure
from endoscopy.renderer.rays import Lens

LUMINANCE = (0.2126, 0.7152, 0.0722)
TARGET_LUMINANCE = 0.22
SHOT_NOISE = 4e-4
READ_NOISE = 0.004
MAX_BLUR = 2.0  # pixels


def vignetting(lens: Lens) -> Tensor:
    """Return the transmission (P,) of the lens, cos²(0.6 angle)."""
    return torch.cos(0.6 * lens.angle).square()


def gains(radiance: Tensor, exposure: Exposure) -> Tensor:
    """Return the gain (T,) of every frame; radiance (3, T, P) inside the aperture."""
    if exposure == "fixed":
        return torch.ones(radiance.shape[1])
    return TARGET_LUMINANCE / mean_luminance(radiance).clamp(min=1e-6)


def mean_luminance(radiance: Tensor) -> Tensor:
    """Return the mean luminance (T,) of frames (3, T, P)."""
    red, green, blue = radiance
    return (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue).mean(1)


def expose(
    radiance: Tensor, lens: Lens, side: int, brand: Brand, exposure: Exposure, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return what the camera records of its radiance.

    Args:
        radiance: (3, T, P) linear, before the lens.
        lens: The P pixels inside the aperture.
        side: Height and width of the frame.
        brand: Gain and color.
        exposure: Fixed gain or automatic gain control.
        rng: Decides blur and noise.

    Returns:
        Frames (T, 3, side, side) uint8, black outside the aperture, and the gains (T,).
    """
    color = torch.tensor(brand.color).view(3, 1, 1) * brand.gain
    seen = radiance * color * vignetting(lens)
    seen = _blur(seen, lens, side, rng)
    gain = gains(seen, exposure)
    noise = torch.randn(seen.shape, generator=rng)
    seen = seen + (SHOT_NOISE * seen + READ_NOISE**2).sqrt() * noise
    display = tone((seen * gain.unsqueeze(1)).clamp(min=0))
    levels = (display * 255 + 0.5).to(torch.uint8)
    frames = torch.zeros(3, radiance.shape[1], side * side, dtype=torch.uint8)
    frames.index_copy_(2, lens.pixels, levels)
    return frames.transpose(0, 1).reshape(-1, 3, side, side).contiguous(), gain


def tone(linear: Tensor) -> Tensor:
    """Return the display value of linear light: a soft knee, then gamma 1 / 1.4."""
    return (1.15 * linear / (0.35 + linear)).clamp(max=1).pow(1 / 1.4)


def _blur(seen: Tensor, lens: Lens, side: int, rng: torch.Generator) -> Tensor:
    """Average every frame along a line of up to two pixels in a random direction."""
    num_frames = seen.shape[1]
    length, angle = torch.rand(2, num_frames, generator=rng)
    length, angle = length * MAX_BLUR / 2, angle * (2 * math.pi)
    share = torch.tensor([-1.0, 0.0, 1.0])
    cell = torch.tensor([-1.0, 0.0, 1.0])
    right = (length * angle.cos()).unsqueeze(1) * share
    down = (length * angle.sin()).unsqueeze(1) * share
    columns = (1 - (cell - right.unsqueeze(2)).abs()).clamp(min=0)  # frame, sample, cell
    rows = (1 - (cell - down.unsqueeze(2)).abs()).clamp(min=0)
    kernel = (rows.unsqueeze(3) * columns.unsqueeze(2)).mean(1)  # frame, row, column
    frames = torch.zeros(3, num_frames, (side + 2) ** 2).index_copy_(2, padded(lens, side), seen)
    frames = frames.view(3, num_frames, side + 2, side + 2)
    blurred = torch.zeros(3, num_frames, side, side)
    for row in range(3):
        for column in range(3):
            part = frames[:, :, row : row + side, column : column + side]
            blurred.addcmul_(part, kernel[:, row, column].view(-1, 1, 1))
    return blurred.flatten(2).index_select(2, lens.pixels)


def padded(lens: Lens, side: int) -> Tensor:
    """Return the positions (P,) of the pixels in a frame with a margin of one pixel."""
    return (lens.pixels // side + 1) * (side + 2) + lens.pixels % side + 1
