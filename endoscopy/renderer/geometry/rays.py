"""Rays and the lens that sends them out."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

FAR = 250.0
"""Distance in mm at which a ray has left the scene; a 16-bit depth map holds 256 mm."""


class Rays(NamedTuple):
    """N rays, origins in mm and unit directions, each component (N,) float32."""

    x: Tensor
    y: Tensor
    z: Tensor
    dx: Tensor
    dy: Tensor
    dz: Tensor

    def at(self, distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the points at these distances (N,)."""
        return (
            self.x + distance * self.dx,
            self.y + distance * self.dy,
            self.z + distance * self.dz,
        )


class Lens(NamedTuple):
    """The pixels inside the circular aperture of an equidistant fisheye.

    Attributes:
        pixels: (P,) int64 position in the flattened frame.
        directions: (3, P) unit vectors in camera coordinates: right, down, forward.
        angle: (P,) angle off the axis in radians.
    """

    pixels: Tensor
    directions: Tensor
    angle: Tensor


@lru_cache(maxsize=8)
def fisheye(side: int, field_of_view: float, *, whole: bool = False) -> Lens:
    """Return the lens: the angle off the axis is proportional to the distance from the center.

    Args:
        side: Height and width of the frame in pixels, the diameter of the aperture.
        field_of_view: Full angle in degrees.
        whole: Take the pixels outside the aperture too, which see nothing in a real endoscope.
    """
    center = (torch.arange(side, dtype=torch.float64) + 0.5) * (2 / side) - 1
    down, right = torch.meshgrid(center, center, indexing="ij")
    radius = torch.hypot(right, down).flatten()
    pixels = torch.arange(side**2) if whole else (radius <= 1).nonzero().squeeze(1)
    radius = radius[pixels]
    angle = radius * math.radians(field_of_view / 2)
    outward = angle.sin() / radius.clamp(min=1e-12)
    right, down = right.flatten()[pixels], down.flatten()[pixels]
    directions = torch.stack([right * outward, down * outward, angle.cos()])
    return Lens(pixels, directions.float(), angle.float())


def camera_rays(lens: Lens, position: Tensor, axes: Tensor) -> Rays:
    """Return the rays of T cameras, frame after frame, N = T P.

    Args:
        lens: The lens.
        position: (T, 3) in mm.
        axes: (T, 3, 3), columns right, down and forward in the coordinates of the scene.
    """
    origins = position.t().unsqueeze(2).expand(3, len(position), len(lens.pixels))
    right, down, forward = lens.directions
    directions = [
        axes[:, row, 0:1] * right + axes[:, row, 1:2] * down + axes[:, row, 2:3] * forward
        for row in range(3)
    ]
    return Rays(*origins.flatten(1), *(component.flatten() for component in directions))
