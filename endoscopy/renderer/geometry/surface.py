"""What a ray sees where it ends: the normal, and whether it is polyp."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from endoscopy.renderer.geometry.field import FOLD_SHARPNESS, polyp, smooth_minimum, wall
from endoscopy.renderer.scene import Scene

TAP = 0.02
TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))
Vectors = tuple[Tensor, Tensor, Tensor]


class Ball(NamedTuple):
    """A ball that holds the polyp and its junction with the wall.

    Attributes:
        x: Its center lies at (x, 0, 0), in mm.
        radius: In mm.
        top: Nothing of the polyp reaches below this x.
    """

    x: float
    radius: float
    top: float


def polyp_ball(scene: Scene) -> Ball:
    """Return a ball outside which, as below its ``top``, the field is that of the wall alone."""
    half = scene.size / 2
    sag = scene.radius - math.sqrt(scene.radius**2 - half**2)
    turned = scene.bend * scene.bend_length * (math.hypot(1, half / scene.bend_length) - 1)
    margin = turned + 1.5 * scene.blend
    depth = scene.apex + sag
    return Ball(
        scene.radius - depth / 2,
        math.hypot(depth / 2, half) + margin,
        scene.radius - depth - margin,
    )


def surface(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> tuple[Vectors, Tensor]:
    """Return the unit normals toward the lumen, three parts (N,), and which points (N,) are polyp.

    The normals are those of the wall, but of the whole field inside the ball around the polyp.

    Args:
        scene: The scene.
        x: (N,) coordinate of the points in mm, each on the surface.
        y: (N,) coordinate.
        z: (N,) coordinate.
    """
    gradient = wall_gradient(scene, x, y, z)
    polypous = torch.zeros_like(x, dtype=torch.bool)
    ball = polyp_ball(scene)
    gap = (x - ball.x).square_().addcmul_(y, y).addcmul_(z, z)
    close = (gap < ball.radius**2).nonzero().squeeze(1)
    if len(close):
        part = [component.index_select(0, close) for component in (x, y, z)]
        inner, found = _tapped_gradient(scene, *part)
        for whole, part in zip(gradient, inner, strict=True):
            whole.index_copy_(0, close, part)
        polypous.index_copy_(0, close, found)
    first, second, third = gradient
    length = first.square().addcmul_(second, second).addcmul_(third, third).sqrt_()
    length.clamp_(min=1e-12)
    return (first.div_(length), second.div_(length), third.div_(length)), polypous


def wall_gradient(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> Vectors:
    """Return the gradient of the field of the wall, three parts (N,), by its derivatives."""
    length, wavenumber = scene.bend_length, 2 * math.pi / scene.fold_period
    relative = z / length
    root = torch.addcmul(torch.tensor(1.0), relative, relative).sqrt_()
    across = torch.sub(x, root, alpha=scene.bend_x * length).add_(scene.bend_x * length)
    up = torch.sub(y, root, alpha=scene.bend_y * length).add_(scene.bend_y * length)
    rho = across.square().addcmul_(up, up).sqrt_().clamp_(min=1e-6)
    across, up = across.div_(rho), up.div_(rho)
    turn_cosine, turn_sine = math.cos(scene.lobe_phase / 3), math.sin(scene.lobe_phase / 3)
    cosine = (across * turn_cosine).add_(up, alpha=turn_sine)
    sine = (up * turn_cosine).sub_(across, alpha=turn_sine)
    lobes = (cosine * cosine).mul_(1.4).sub_(1.05).mul_(cosine).add_(0.65)
    swerve = (sine * sine).mul_(-4.2).add_(3.15).mul_(sine)  # 1.05 sin(3 angle - q)
    phase = (z * wavenumber).add_(scene.fold_phase)
    folds = phase.cos().sub_(1).mul_(FOLD_SHARPNESS).exp_().mul_(scene.radius * scene.fold_height)
    from_base = x - scene.radius
    squared = from_base.square().addcmul_(y, y).addcmul_(z, z)
    fading = squared.mul_(-0.5 / scene.fold_fade**2).exp_()
    fade = 1 - fading
    swerve = swerve.mul_(folds).mul_(fade).div_(rho)
    height = folds * lobes
    fading = fading.mul_(height).mul_(1 / scene.fold_fade**2)
    radial = torch.addcmul(across, swerve, up).neg_()
    tangential = (swerve * across).sub_(up)
    tilt = relative.div_(root)
    axial = phase.sin_().mul_(height).mul_(fade).mul_(FOLD_SHARPNESS * wavenumber)
    axial.sub_((tilt * radial).mul_(scene.bend_x)).sub_((tilt * tangential).mul_(scene.bend_y))
    return (
        radial.addcmul_(fading, from_base, value=-1),
        tangential.addcmul_(fading, y, value=-1),
        axial.addcmul_(fading, z, value=-1),
    )


def _tapped_gradient(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient (3, N) of the whole field by four taps, and which points are polyp."""
    taps = torch.tensor(TETRAHEDRON).t().unsqueeze(2) * TAP
    folded = wall(scene, x + taps[0], y + taps[1], z + taps[2])
    lump = polyp(scene, folded.x, folded.y, z + taps[2])
    joined = smooth_minimum(folded.value, lump, scene.blend)
    gradient = torch.stack([(joined * tap).sum(0) for tap in taps])
    return gradient / (4 * TAP**2), (lump - folded.value).sum(0) < 0
