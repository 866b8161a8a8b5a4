"""The scene of one object: a bent tube with haustral folds and a polyp on its wall.

Lengths in mm. The axis of the tube runs along z; the polyp sits on the wall at (R, 0, 0).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from endoscopy.renderer.config import Frequencies, RendererConfig
from endoscopy.renderer.randomness import Purpose, numpy_generator

SHAPES = ("sessile", "flat", "pedunculated")
SHAPE_FREQUENCIES = (0.45, 0.35, 0.20)
SIZE_RANGES = ((2.0, 5.0), (5.0, 10.0), (10.0, 20.0))
REAL_FREQUENCIES = (0.76, 0.14, 0.10)
NUM_WAVES = 9
MAX_HEIGHT = 1.25  # of a polyp on a stalk, in radii of the tube: the lumen stays open


class Scene(NamedTuple):
    """Parameters of a scene.

    Attributes:
        radius: Radius R of the tube.
        fold_height: Height of the folds relative to R.
        fold_period: Distance of the folds along the axis.
        fold_phase: Position of the folds in radians.
        lobe_phase: Angle of the three lobes of a fold in radians.
        bend_x: Slope of the center line far away, along x.
        bend_y: The same along y.
        bend_length: Length over which the center line turns.
        shape: Index into `SHAPES`.
        size: Larger axis of the footprint, the label.
        size_minor: Smaller axis of the footprint.
        size_y: Axis of the footprint around the tube.
        size_z: Axis of the footprint along the tube.
        height: Height of the polyp above the wall, without stalk.
        stalk: Length of the stalk.
        albedo: Reflectance of the mucosa, red, green and blue.
        polyp_tone: Reflectance of the polyp relative to the mucosa.
        vessels: Strength of the vascular texture.
        specular: Strength of the wet highlights.
        waves: Wave vectors (3 per mm) and phases of the texture, (NUM_WAVES, 4) float32.
    """

    radius: float
    fold_height: float
    fold_period: float
    fold_phase: float
    lobe_phase: float
    bend_x: float
    bend_y: float
    bend_length: float
    shape: int
    size: float
    size_minor: float
    size_y: float
    size_z: float
    height: float
    stalk: float
    albedo: tuple[float, float, float]
    polyp_tone: float
    vessels: float
    specular: float
    waves: Tensor

    @property
    def fold_fade(self) -> float:
        """Distance from the polyp below which the folds fade out."""
        return 0.6 * self.size + 2

    @property
    def blend(self) -> float:
        """Width of the smooth junction between polyp and wall."""
        return 0.04 * self.size + 0.15

    @property
    def apex(self) -> float:
        """Height of the highest point of the polyp above the wall."""
        return self.stalk + self.height

    @property
    def bend(self) -> float:
        """Largest slope of the center line."""
        return math.hypot(self.bend_x, self.bend_y)


def draw_scene(config: RendererConfig, index: int) -> Scene:
    """Draw the scene of object ``index``."""
    rng = numpy_generator(config.seed, index, Purpose.SCENE)
    size = _draw_size(rng, config.frequencies)
    shape = int(rng.choice(len(SHAPES), p=SHAPE_FREQUENCIES))
    ratio, relative_height = float(rng.uniform(0.8, 1.25)), float(rng.uniform())
    radius = float(rng.uniform(17, 24))
    longer, shorter = size, size * min(ratio, 1 / ratio) ** 2
    stalk = 0.0
    if shape == SHAPES.index("pedunculated"):
        shorter = height = size
        stalk = min((0.2 + 0.2 * relative_height) * size, MAX_HEIGHT * radius - size)
    else:
        low, high = (0.35, 0.60) if shape == SHAPES.index("sessile") else (0.15, 0.28)
        height = (low + (high - low) * relative_height) * size
    slope = max(0.0, float(rng.uniform(-0.5, 0.5)))  # half of the tubes are straight
    direction = rng.uniform(0, 2 * math.pi)
    return Scene(
        radius=radius,
        fold_height=float(rng.uniform(0.10, 0.28)),
        fold_period=float(rng.uniform(16, 30)),
        fold_phase=float(rng.uniform(0, 2 * math.pi)),
        lobe_phase=float(rng.uniform(0, 2 * math.pi)),
        bend_x=float(slope * math.cos(direction)),
        bend_y=float(slope * math.sin(direction)),
        bend_length=float(rng.uniform(30, 60)),
        shape=shape,
        size=size,
        size_minor=shorter,
        size_y=longer if ratio >= 1 else shorter,
        size_z=shorter if ratio >= 1 else longer,
        height=height,
        stalk=stalk,
        albedo=_draw_albedo(rng),
        polyp_tone=float(rng.uniform(0.85, 1.1)),
        vessels=float(rng.uniform(0.5, 1.0)),
        specular=float(rng.uniform(0.6, 1.2)),
        waves=_draw_waves(rng),
    )


def _draw_size(rng: np.random.Generator, frequencies: Frequencies) -> float:
    low, high = SIZE_RANGES[0][0], SIZE_RANGES[-1][1]
    kind, share = rng.choice(len(SIZE_RANGES), p=REAL_FREQUENCIES), rng.uniform()
    if frequencies == "real":
        low, high = SIZE_RANGES[kind]
    return float(low * (high / low) ** share)


def _draw_albedo(rng: np.random.Generator) -> tuple[float, float, float]:
    """Vary the color of the mucosa, but its luminance little: brightness reflects the distance."""
    warmth = rng.uniform(-1, 1)
    level = rng.uniform(0.96, 1.04)
    return (
        float(level * (0.98 + 0.01 * warmth)),
        float(level * (0.47 - 0.03 * warmth)),
        float(level * (0.37 - 0.05 * warmth)),
    )


def _draw_waves(rng: np.random.Generator) -> Tensor:
    """Draw plane waves: three of the vessels, three of the tint, three of the wet surface."""
    direction = rng.normal(size=(NUM_WAVES, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    length = rng.uniform(2, 6, size=NUM_WAVES)
    length[3:6] = rng.uniform(5, 9, size=3)
    length[6:] = rng.uniform(1.0, 2.0, size=3)
    phase = rng.uniform(0, 2 * np.pi, size=NUM_WAVES)
    waves = np.column_stack([2 * np.pi * direction / length[:, None], phase])
    return torch.from_numpy(waves.astype(np.float32))
