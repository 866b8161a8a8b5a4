import math

import pytest
import torch

from endoscopy.renderer.lumen import Rays
from endoscopy.renderer.scene import SHAPES, RendererConfig, draw_scene


@pytest.fixture
def tube():
    """``tube(**changes)``: a straight tube without folds, texture or highlights."""
    scene = draw_scene(RendererConfig(), 0)
    plain = {
        "radius": 20.0, "fold_height": 0.0, "bend_x": 0.0, "bend_y": 0.0, "albedo": (0.8, 0.5, 0.4),
        "polyp_tone": 1.0, "vessels": 0.0, "specular": 0.0, "waves": torch.zeros(9, 4),
        "shape": SHAPES.index("sessile"), "size": 2.0, "size_minor": 2.0, "size_y": 2.0,
        "size_z": 2.0, "height": 1.0, "stalk": 0.0,
    }  # fmt: skip
    return lambda **changes: scene._replace(**(plain | changes))


@pytest.fixture
def fan():
    """``fan(origin, forward, toward, degrees)``: rays of one origin at angles off ``forward``."""

    def make(origin, forward, toward, degrees):
        angle = torch.as_tensor(degrees, dtype=torch.float64) * (math.pi / 180)
        forward, toward = (torch.tensor(v, dtype=torch.float64) for v in (forward, toward))
        direction = angle.cos().unsqueeze(1) * forward + angle.sin().unsqueeze(1) * toward
        start = torch.tensor(origin, dtype=torch.float64).expand_as(direction)
        return Rays(*(part.float().contiguous() for part in (*start.t(), *direction.t())))

    return make
