"""The implicit surface: positive inside the lumen, zero on the mucosa; the plain definition.

All coordinates are float32 tensors of one shape in mm, as `endoscopy.renderer.scene` lays them out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from endoscopy.renderer.scene import SHAPES, Scene

FOLD_SHARPNESS = 6.0
STALK_RADIUS = 0.18  # of the size of the polyp


class Wall(NamedTuple):
    """The folded wall at some points.

    Attributes:
        value: Radius of the wall in this direction minus distance from the center line.
        x: Position relative to the center line.
        y: Position relative to the center line.
    """

    value: Tensor
    x: Tensor
    y: Tensor


def wall(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> Wall:
    """Return R (1 - a b(z) t(angle) f) - rho.

    b = exp(6 (cos(2πz/L + p) - 1)) are the folds, t = 0.65 + 0.35 cos(3 angle - q) their three
    lobes, and f fades them out near the polyp.
    """
    turned = scene.bend_length * (((z / scene.bend_length).square() + 1).sqrt() - 1)
    across, up = x - scene.bend_x * turned, y - scene.bend_y * turned
    across_squared, up_squared = across.square(), up.square()
    rho_squared = across_squared + up_squared
    rho = rho_squared.sqrt()
    cosine = torch.cos(z * (2 * math.pi / scene.fold_period) + scene.fold_phase)
    folds = torch.exp(FOLD_SHARPNESS * cosine - FOLD_SHARPNESS)
    triple_cosine = across * (across_squared - 3 * up_squared)
    triple_sine = up * (3 * across_squared - up_squared)
    lobes = math.cos(scene.lobe_phase) * triple_cosine + math.sin(scene.lobe_phase) * triple_sine
    lobes = 0.65 + 0.35 * lobes / (rho_squared * rho + 1e-6)
    from_polyp = (x - scene.radius).square() + y.square() + z.square()
    fade = 1 - torch.exp(from_polyp * (-0.5 / scene.fold_fade**2))
    value = scene.radius - (scene.radius * scene.fold_height) * folds * lobes * fade - rho
    return Wall(value, across, up)


def polyp(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the distance from the polyp, to first order; x and y relative to the center line.

    Sessile and flat polyps are half ellipsoids bent along the wall, so that the footprint keeps
    its two axes; pedunculated ones are a sphere on a stalk.
    """
    if SHAPES[scene.shape] == "pedunculated":
        head = scene.radius - scene.stalk - scene.size / 2
        sides = y.square() + z.square()
        sphere = ((x - head).square() + sides).sqrt() - scene.size / 2
        beyond = (head - x).clamp(min=0)
        stalk = (beyond.square() + sides).sqrt() - STALK_RADIUS * scene.size
        return smooth_minimum(sphere, stalk, scene.blend)
    sag = (scene.radius**2 - y.square()).clamp(min=scene.radius**2 / 4).sqrt()
    axes = (scene.height, scene.size_y / 2, scene.size_z / 2)
    parts = [value / axis for value, axis in zip((sag - x, y, z), axes, strict=True)]
    level = (parts[0].square() + parts[1].square() + parts[2].square()).sqrt()
    parts = [part / axis for part, axis in zip(parts, axes, strict=True)]
    slope = (parts[0].square() + parts[1].square() + parts[2].square()).sqrt()
    return level * (level - 1) / (slope + 1e-9)


def field(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the smooth union of wall and polyp: negative in tissue, zero on the surface."""
    folded = wall(scene, x, y, z)
    return smooth_minimum(folded.value, polyp(scene, folded.x, folded.y, z), scene.blend)


def smooth_minimum(a: Tensor, b: Tensor, width: float) -> Tensor:
    """Return the minimum, rounded off where a and b differ by less than ``width``."""
    overlap = (width - (a - b).abs()).clamp(min=0)
    return torch.minimum(a, b) - overlap.square() * (0.25 / width)
