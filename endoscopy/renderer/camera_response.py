"""From radiance to the image: vignetting, motion blur, exposure, noise, tone curve, gamma."""

import math

import torch
from torch import Tensor

from endoscopy.renderer.brand import Brand
from endoscopy.renderer.config import Exposure
from endoscopy.renderer.geometry.rays import Lens

LUMINANCE = (0.2126, 0.7152, 0.0722)
TARGET_LUMINANCE = 0.22
SHOT_NOISE = 4e-4
READ_NOISE = 0.004
MAX_BLUR = 2.0  # pixels
Channels = Tensor | list[Tensor]


def vignetting(lens: Lens) -> Tensor:
    """Return the transmission (P,) of the lens, cos²(0.6 angle)."""
    return torch.cos(0.6 * lens.angle).square()


def gains(radiance: Channels, exposure: Exposure) -> Tensor:
    """Return the gain (T,) of every frame; three channels (T, P) inside the aperture."""
    if exposure == "fixed":
        return torch.ones(len(radiance[0]))
    return TARGET_LUMINANCE / mean_luminance(radiance).clamp(min=1e-6)


def mean_luminance(radiance: Channels) -> Tensor:
    """Return the mean luminance (T,) of three channels (T, P)."""
    red, green, blue = radiance
    return (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue).mean(1)


def expose(
    radiance: Tensor, lens: Lens, side: int, brand: Brand, exposure: Exposure, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the frames that the camera records.

    Args:
        radiance: (3, T, P) linear, before the lens.
        lens: The P pixels inside the aperture.
        side: Height and width of the frame.
        brand: Gain and color.
        exposure: Fixed gain or automatic gain control.
        rng: For blur and noise.

    Returns:
        Frames (T, 3, side, side) uint8, black outside the aperture, and the gains (T,).
    """
    dimming = vignetting(lens)
    seen = [
        channel * (dimming * (brand.gain * factor))
        for channel, factor in zip(radiance, brand.color, strict=True)
    ]
    seen = _blur(seen, lens, side, rng)
    gain = gains(seen, exposure)
    frames = torch.zeros(gain.shape[0], 3, side * side, dtype=torch.uint8)
    for row, channel in enumerate(seen):
        deviation = (channel * SHOT_NOISE).add_(READ_NOISE**2).sqrt_()
        noise = torch.randn(channel.shape, generator=rng)
        display = tone(torch.addcmul(channel, deviation, noise).mul_(gain.unsqueeze(1)))
        levels = display.mul_(255).add_(0.5).to(torch.uint8)
        frames[:, row].index_copy_(1, lens.pixels, levels)
    return frames.view(-1, 3, side, side), gain


def tone(linear: Tensor) -> Tensor:
    """Return the display value of linear light: a soft knee, then gamma 1 / 1.4."""
    linear = linear.clamp(min=0)
    return (linear * 1.15).div_(linear + 0.35).clamp_(max=1).pow_(1 / 1.4)


def _blur(channels: list[Tensor], lens: Lens, side: int, rng: torch.Generator) -> list[Tensor]:
    """Average every frame along a line of up to two pixels in a random direction."""
    num_frames = len(channels[0])
    length, angle = torch.rand(2, num_frames, generator=rng)
    length, angle = length * MAX_BLUR / 2, angle * (2 * math.pi)
    cell = torch.tensor([-1.0, 0.0, 1.0])
    right = (length * angle.cos()).unsqueeze(1) * cell
    down = (length * angle.sin()).unsqueeze(1) * cell
    columns = (1 - (cell - right.unsqueeze(2)).abs()).clamp(min=0)  # frame, sample, cell
    rows = (1 - (cell - down.unsqueeze(2)).abs()).clamp(min=0)
    kernel = (rows.unsqueeze(3) * columns.unsqueeze(2)).mean(1).flatten(1)  # frame, cell
    width = side + 2
    place = (lens.pixels // side + 1) * width + lens.pixels % side + 1
    span, result = width**2 - 2 * width - 2, []
    for channel in channels:
        frame = torch.zeros(num_frames, width**2).index_copy_(1, place, channel)
        blurred = torch.zeros_like(frame)
        middle = blurred[:, width + 1 : -width - 1]
        for row in range(3):
            for column in range(3):
                start = row * width + column
                weight = kernel[:, 3 * row + column].unsqueeze(1)
                middle.addcmul_(frame[:, start : start + span], weight)
        result.append(blurred.index_select(1, place))
    return result
