"""The shapes of the small world, as signed distances from their edges."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, map_coordinates

SPAN = 1.7  # radii from the middle of a field to its border
FINE, GRID = 480, 96  # points of a side where shapes are cut out, and of a stored field

Mask = np.ndarray  # (FINE, FINE) bool, whether a point belongs to a shape


class Plane(NamedTuple):
    """Points of the plane, in radii from the middle; ``y`` points down.

    Attributes:
        x: (H, W).
        y: (H, W).
    """

    x: np.ndarray
    y: np.ndarray

    def disc(self, x: float, y: float, width: float, height: float | None = None) -> Mask:
        """Return an ellipse with these half axes around a point."""
        across, down = (self.x - x) / width, (self.y - y) / (height or width)
        return across**2 + down**2 <= 1

    def box(self, left: float, top: float, right: float, bottom: float) -> Mask:
        """Return a rectangle."""
        return (self.x >= left) & (self.x <= right) & (self.y >= top) & (self.y <= bottom)

    def polygon(self, *corners: tuple[float, float]) -> Mask:
        """Return the mask of pixels inside a polygon, by the even-odd rule."""
        inside = np.zeros(self.x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if y0 != y1:
                crossed = (self.y < y0) != (self.y < y1)
                inside ^= crossed & (self.x < x0 + (self.y - y0) * (x1 - x0) / (y1 - y0))
        return inside

    def mirrored(self) -> "Plane":
        """Return the plane with left and right exchanged."""
        return Plane(-self.x, self.y)


def _star(at: Plane) -> Mask:
    turns = np.arange(10) * np.pi / 5 - np.pi / 2
    sizes = np.where(np.arange(10) % 2, 0.43, 1.05)
    return at.polygon(*zip(sizes * np.cos(turns), sizes * np.sin(turns), strict=True))


def _heart(at: Plane) -> Mask:
    x, y = at.x * 1.2, 0.15 - at.y * 1.15
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def _fish(at: Plane) -> Mask:
    tail = at.polygon((0.3, 0), (1.1, -0.65), (1.1, 0.65))
    return (at.disc(-0.22, 0, 0.8, 0.55) | tail) & ~at.disc(-0.6, -0.12, 0.13)


def _house(at: Plane) -> Mask:
    roof = at.polygon((0, -1.05), (1.05, -0.1), (-1.05, -0.1))
    return (roof | at.box(-0.75, -0.15, 0.75, 0.9)) & ~at.box(-0.2, 0.3, 0.2, 0.9)


def _tree(at: Plane) -> Mask:
    top = at.polygon((0, -1.1), (0.65, -0.2), (-0.65, -0.2))
    low = at.polygon((0, -0.6), (0.9, 0.5), (-0.9, 0.5))
    return top | low | at.box(-0.2, 0.45, 0.2, 1.0)


def _arrow(at: Plane) -> Mask:
    return at.box(-1.05, -0.27, 0.2, 0.27) | at.polygon((0.1, -0.85), (1.08, 0), (0.1, 0.85))


def _flower(at: Plane) -> Mask:
    turns = np.arange(5) * 2 * np.pi / 5 - np.pi / 2
    petals = [at.disc(0.62 * np.cos(a), 0.62 * np.sin(a), 0.42) for a in turns]
    return (np.logical_or.reduce(petals) | at.disc(0, 0, 0.4)) & ~at.disc(0, 0, 0.22)


def _boat(at: Plane) -> Mask:
    hull = at.polygon((-1.05, 0.35), (1.05, 0.35), (0.65, 0.9), (-0.65, 0.9))
    left = at.polygon((-0.06, -1.05), (-0.06, 0.2), (-0.9, 0.2))
    return hull | left | at.polygon((0.12, -0.75), (0.12, 0.2), (0.75, 0.2))


def _mushroom(at: Plane) -> Mask:
    return (at.disc(0, 0, 1.05, 0.9) & (at.y < 0.08)) | at.box(-0.3, 0, 0.3, 0.9)


def _cup(at: Plane) -> Mask:
    handle = at.disc(0.5, 0, 0.55) & ~at.disc(0.5, 0, 0.28)
    return at.box(-0.85, -0.7, 0.5, 0.85) | (handle & (at.x > 0.45))


def _key(at: Plane) -> Mask:
    teeth = at.box(0.42, 0, 0.64, 0.52) | at.box(0.83, 0, 1.05, 0.52)
    bow = at.disc(-0.6, 0, 0.5) & ~at.disc(-0.6, 0, 0.22)
    return bow | at.box(-0.2, -0.15, 1.05, 0.15) | teeth


def _bell(at: Plane) -> Mask:
    skirt = at.polygon((-0.58, -0.3), (0.58, -0.3), (0.98, 0.62), (-0.98, 0.62))
    return at.disc(0, -0.35, 0.58, 0.68) | skirt | at.disc(0, 0.72, 0.26)


def _cloud(at: Plane) -> Mask:
    puffs = at.disc(-0.6, 0.2, 0.45) | at.disc(-0.02, -0.15, 0.6) | at.disc(0.65, 0.22, 0.42)
    return puffs | at.box(-0.6, 0.2, 0.65, 0.65)


def _umbrella(at: Plane) -> Mask:
    gaps = [at.disc(x, 0, 0.36, 0.22) for x in (-0.7, 0.0, 0.7)]
    canopy = at.disc(0, 0, 1.06) & (at.y < 0) & ~np.logical_or.reduce(gaps)
    hook = at.disc(0.22, 0.75, 0.33) & ~at.disc(0.22, 0.75, 0.13) & (at.y > 0.75)
    return canopy | at.box(-0.11, -0.3, 0.1, 0.78) | hook


def _bolt(at: Plane) -> Mask:
    return at.polygon(
        (0.35, -1.1), (-0.7, 0.15), (-0.12, 0.15), (-0.35, 1.1), (0.7, -0.25), (0.1, -0.25)
    )


def _crown(at: Plane) -> Mask:
    points = ((-1.05, -0.6), (-0.5, 0), (0, -0.9), (0.5, 0), (1.05, -0.6), (0.82, 0.75))
    return at.polygon(*points, (-0.82, 0.75))


def _rocket(at: Plane) -> Mask:
    fins = [p.polygon((0.25, 0.15), (0.85, 0.85), (0.2, 0.65)) for p in (at, at.mirrored())]
    body = (at.disc(0, -0.05, 0.42, 1.05) & (at.y < 0.68)) & ~at.disc(0, -0.3, 0.17)
    return body | fins[0] | fins[1] | at.polygon((-0.22, 0.6), (0.22, 0.6), (0, 1.1))


def _butterfly(at: Plane) -> Mask:
    wings = [p.disc(0.56, -0.4, 0.52, 0.46) | p.disc(0.46, 0.45, 0.42) for p in (at, at.mirrored())]
    return wings[0] | wings[1] | at.box(-0.1, -0.7, 0.1, 0.85)


BASE_SHAPES: dict[str, Callable[[Plane], Mask]] = {
    "circle": lambda at: at.disc(0, 0, 0.95),
    "square": lambda at: at.box(-0.82, -0.82, 0.82, 0.82),
    "triangle": lambda at: at.polygon((0, -0.95), (1.02, 0.8), (-1.02, 0.8)),
    "star": _star,
    "drop": lambda at: at.disc(0, 0.38, 0.62) | at.polygon((0, -1.1), (0.57, 0.15), (-0.57, 0.15)),
    "ring": lambda at: at.disc(0, 0, 1.0) & ~at.disc(0, 0, 0.5),
    "cross": lambda at: at.box(-0.33, -0.98, 0.33, 0.98) | at.box(-0.98, -0.33, 0.98, 0.33),
    "heart": _heart,
    "crescent": lambda at: at.disc(-0.05, 0, 1.0) & ~at.disc(0.42, -0.06, 0.82),
    "diamond": lambda at: at.polygon((0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)),
}
"""Shapes that the base is trained on."""

NEW_SHAPES: dict[str, Callable[[Plane], Mask]] = {
    "fish": _fish,
    "house": _house,
    "tree": _tree,
    "arrow": _arrow,
    "flower": _flower,
    "boat": _boat,
    "mushroom": _mushroom,
    "cup": _cup,
    "key": _key,
    "bell": _bell,
    "cloud": _cloud,
    "umbrella": _umbrella,
    "bolt": _bolt,
    "crown": _crown,
    "rocket": _rocket,
    "butterfly": _butterfly,
}
"""Shapes that the base has never seen; each has an adapter."""

SHAPES = BASE_SHAPES | NEW_SHAPES


@cache
def field(name: str) -> np.ndarray:
    """Return the signed distances (GRID, GRID) from the edge of a shape, in radii, negative inside.

    Args:
        name: Of the shape.
    """
    axis = (np.arange(FINE) + 0.5) * (2 * SPAN / FINE) - SPAN
    mask = SHAPES[name](Plane(*np.meshgrid(axis, axis)))
    fine = (distance_transform_edt(~mask) - distance_transform_edt(mask)) * (2 * SPAN / FINE)
    each = FINE // GRID
    return fine.reshape(GRID, each, GRID, each).mean((1, 3)).astype(np.float32)


def distances(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distances of points from the edge of a shape, in radii.

    Args:
        name: Of the shape.
        x: Of any shape, in radii to the right of its middle.
        y: The same below it. Beyond the field its border counts, and the way to it.
    """
    places = [(np.clip(axis, -SPAN, SPAN) / SPAN + 1) * GRID / 2 - 0.5 for axis in (y, x)]
    sampled = map_coordinates(field(name), places, order=1, mode="nearest")
    return sampled + np.maximum(np.maximum(np.abs(x), np.abs(y)) - SPAN, 0)
