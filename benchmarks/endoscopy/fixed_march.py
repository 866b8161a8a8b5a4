"""Eager sphere tracing with a fixed number of steps: the plain definition that `march` replaces.

It is short to write down and wrong where rays graze the wall: after 26 steps it stops 1.8 mm short
of a plain cylinder at 10 degrees off its axis, 69 mm at 5 degrees.
"""

import torch
from torch import Tensor

from endoscopy.renderer.lumen import FAR, Rays, field
from endoscopy.renderer.scene import Scene

STEPS = 26
RELAXATION = 0.85


def fixed_march(scene: Scene, rays: Rays, steps: int = STEPS) -> Tensor:
    """Return the distance (N,) in mm that each ray has gone after all steps, at most `FAR`."""
    distance = torch.zeros_like(rays.x)
    for _ in range(steps):
        distance = distance + RELAXATION * field(scene, *rays.at(distance))
    return distance.clamp(0, FAR)
