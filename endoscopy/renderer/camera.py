"""The camera: its track, frame by frame, and what it records of the radiance."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from endoscopy.renderer.lumen import Lens, field
from endoscopy.renderer.scene import (
    BRANDS,
    Brand,
    Exposure,
    Purpose,
    RendererConfig,
    Scene,
    numpy_generator,
)

CLEARANCE = 2.0
"""Smallest distance in mm of the camera from any surface."""

NEAREST, FARTHEST = 9.0, 30.0
CENTER_SIZE = math.sqrt(2 * 20)  # at this size the shortcut leaves the distance unchanged
ROUNDS = 256
RETREAT = 0.01  # per round, in the second half of the rounds
SHELL_POINTS = 48
SIGHT_POINTS = 16
Array = np.ndarray


class CameraPath(NamedTuple):
    """T poses of the camera.

    Attributes:
        position: (T, 3) float32 in mm.
        axes: (T, 3, 3) float32, columns right, down and forward.
        distance: (T,) float32, distance in mm from the base of the polyp.
        brand: The endoscope.
    """

    position: Tensor
    axes: Tensor
    distance: Tensor
    brand: Brand


def draw_track(config: RendererConfig, index: int, scene: Scene) -> CameraPath:
    """Draw the track of object ``index``: every frame has clearance and sees the polyp.

    Raises:
        RuntimeError: No such track was found, which should not happen for a scene within the
            ranges.
    """
    rng = numpy_generator(config.seed, index, Purpose.CAMERA)
    name = config.brand if config.brand != "mixed" else str(rng.choice(list(BRANDS)))
    for attempt in range(ROUNDS):
        # A shortcut may put the camera closer than the head of a pedunculated polyp: back away.
        retreat = 1 + RETREAT * max(0, attempt - ROUNDS // 2)
        distance = retreat * _draw_distances(rng, config, scene)
        position = _draw_positions(rng, scene, distance)
        if _is_free(scene, torch.from_numpy(position).float()):
            axes = _look(rng, scene, position)
            return CameraPath(
                torch.from_numpy(position).float(),
                torch.from_numpy(axes).float(),
                torch.from_numpy(distance).float(),
                BRANDS[name],
            )
    raise RuntimeError(f"no free track for object {index} of seed {config.seed}")


def _draw_distances(rng: np.random.Generator, config: RendererConfig, scene: Scene) -> Array:
    """Return (T,) distances: log-uniform, then a slow approach or retreat."""
    share = rng.uniform()
    shift = config.shortcut_rho * math.log(scene.size / CENTER_SIZE)
    nearest = max(NEAREST, 0.9 * scene.size + 4)
    start = nearest * (FARTHEST / nearest) ** share * math.exp(shift)
    swing, phase = rng.uniform(0.03, 0.15), rng.uniform(0, 2 * np.pi)
    moving = start * np.exp(swing * np.sin(_times(config.frames) * np.pi + phase))
    return np.maximum(moving, 0.9 * scene.size + 4)


def _draw_positions(rng: np.random.Generator, scene: Scene, distance: Array) -> Array:
    """Return (T, 3): at these distances from the base, between the axis and the wall."""
    highest = np.arcsin(np.minimum(1, 1.3 * scene.radius / distance))
    times = _times(len(distance))
    rise = rng.uniform(math.radians(14), math.radians(78)) + _drift(rng, times, math.radians(4))
    turn = rng.normal(0, math.radians(30)) + _drift(rng, times, math.radians(5))
    rise = np.minimum(rise, highest)
    offset = np.stack(
        [-np.sin(rise), np.cos(rise) * np.sin(turn), -np.cos(rise) * np.cos(turn)], axis=1
    )
    return np.array([scene.radius, 0.0, 0.0]) + distance[:, None] * offset


def _is_free(scene: Scene, position: Tensor) -> bool:
    """Return whether positions (T, 3) keep their clearance and see the polyp."""
    shell = position.unsqueeze(-2) + (1.1 * CLEARANCE) * _sphere(SHELL_POINTS)
    apex = torch.tensor([scene.radius - scene.apex - 0.15 * scene.size, 0.0, 0.0])
    share = torch.linspace(0, 1, SIGHT_POINTS).unsqueeze(1)
    sight = position.unsqueeze(-2) * (1 - share) + apex * share
    points = torch.cat([shell, sight], -2).unbind(-1)
    return bool((field(scene, *(component.contiguous() for component in points)) > 0).all())


def _look(rng: np.random.Generator, scene: Scene, position: Array) -> Array:
    """Return the axes (T, 3, 3): toward a point between polyp and lumen, rolled at random."""
    times = _times(len(position))
    mix = rng.uniform(0, 0.45)
    target = np.array([scene.radius - scene.apex / 2, 0.0, 0.0])
    forward = _unit(_unit(target - position) * (1 - mix) + np.array([0.0, 0.0, mix]))
    tremor = [_drift(rng, times, 0.05, faster=5) for _ in range(3)]
    forward = _unit(forward + rng.normal(0, 0.08, size=3) + np.stack(tremor, axis=1))
    roll = rng.uniform(0, 2 * np.pi) + _drift(rng, times, 0.1)
    helper = np.where(np.abs(forward[:, :1]) < 0.9, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    across = _unit(np.cross(forward, helper))
    up = np.cross(forward, across)
    right = np.cos(roll)[:, None] * across + np.sin(roll)[:, None] * up
    return np.stack([right, np.cross(forward, right), forward], axis=2)


def _times(frames: int) -> Array:
    return (np.arange(frames) + 0.5) / frames


def _drift(rng: np.random.Generator, times: Array, size: float, faster: float = 1) -> Array:
    """Return a smooth random path of about this amplitude, one value per frame."""
    phase = rng.uniform(0, 2 * np.pi, size=2)
    waves = np.sin(2 * np.pi * faster * times + phase[0])
    return np.asarray(size * (waves + 0.5 * np.sin(4.6 * np.pi * faster * times + phase[1])))


def _sphere(count: int) -> Tensor:
    """Return points (count, 3) spread evenly over the unit sphere."""
    height = 1 - (torch.arange(count) + 0.5) * (2 / count)
    angle = torch.arange(count) * (math.pi * (3 - math.sqrt(5)))
    around = (1 - height.square()).sqrt()
    return torch.stack([around * angle.cos(), around * angle.sin(), height], dim=1)


def _unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


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
    """Return the exposure gain (T,) of each frame from three channels (T, P) in the aperture."""
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
