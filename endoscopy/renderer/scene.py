"""What determines the frames of an object: configuration, random numbers, endoscope and scene."""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import check_at_least, check_option


class Brand(NamedTuple):
    """An endoscope.

    Attributes:
        name: Its name, ``endoscope_brand`` on disk.
        field_of_view: Full angle of the equidistant fisheye in degrees.
        gain: Factor on the radiance.
        color: Factors on red, green and blue.
    """

    name: str
    field_of_view: float
    gain: float
    color: tuple[float, float, float]


BRANDS = {
    "A": Brand("A", 140.0, 1.0, (1.0, 1.0, 1.0)),
    "B": Brand("B", 165.0, 0.7, (0.95, 1.0, 1.12)),
}


Exposure = Literal["fixed", "agc"]
DepthMode = Literal["none", "relative", "metric"]
Frequencies = Literal["balanced", "real"]
BrandName = Literal["A", "B", "mixed"]

MIN_SIDE, MAX_SIDE = 16, 2048


@dataclass(frozen=True)
class RendererConfig:
    """Settings of the renderer.

    Args:
        seed: Object ``i`` depends only on the pair (seed, i).
        side: Height and width of a frame in pixels.
        frames: Frames per object.
        exposure: ``fixed`` gain, or ``agc``: mean luminance of every frame brought to 0.22.
        depth: ``metric``: distance along the ray in mm; ``relative``: what a monocular network
            returns, blurred, noisy, inverse depth known up to an affine map only; ``none``.
        frequencies: ``balanced``: sizes log-uniform over 2-20 mm; ``real``: 76 % up to 5 mm, 14 %
            below 10 mm, 10 % above, log-uniform within each class.
        shortcut_rho: The logarithm of the distance of the camera shifts by ``rho`` times the
            logarithm of the size, so that a network can guess the size from the view.
        brand: Endoscope ``A``, the shifted ``B`` (wider field, less gain, another color), or
            ``mixed``: either one by chance.

    Raises:
        ValueError: A setting lies outside its range.
    """

    seed: int = 0
    side: int = 64
    frames: int = 6
    exposure: Exposure = "fixed"
    depth: DepthMode = "metric"
    frequencies: Frequencies = "balanced"
    shortcut_rho: float = 0.0
    brand: BrandName = "A"

    def __post_init__(self) -> None:
        check_at_least(0, seed=self.seed)
        if not MIN_SIDE <= self.side <= MAX_SIDE:
            raise ValueError(f"side must lie in {MIN_SIDE}-{MAX_SIDE} pixels, got {self.side}")
        check_at_least(1, frames=self.frames)
        if not -2 <= self.shortcut_rho <= 2:
            raise ValueError(f"shortcut_rho must lie between -2 and 2, got {self.shortcut_rho}")
        check_option("exposure", self.exposure, get_args(Exposure))
        check_option("depth", self.depth, get_args(DepthMode))
        check_option("frequencies", self.frequencies, get_args(Frequencies))
        check_option("brand", self.brand, get_args(BrandName))


class Purpose(IntEnum):
    """Independent streams of one object, so that an additional draw never shifts the others."""

    SCENE = 0
    CAMERA = 1
    SENSOR = 2
    DEPTH = 3


def numpy_generator(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of one object for one purpose."""
    return np.random.default_rng([seed, index, purpose])


def torch_generator(seed: int, index: int, purpose: Purpose) -> torch.Generator:
    """Return the same for tensors."""
    state = np.random.SeedSequence([seed, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


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
