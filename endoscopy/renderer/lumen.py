"""The lumen: rays, the implicit surface, and what a ray sees where it ends.

The surface function is positive inside and zero on the mucosa.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from endoscopy.renderer.scene import SHAPES, Scene

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
        inner, gradients = _tapped_gradient(scene, *part)
        for whole, part in zip(gradient, inner, strict=True):
            whole.index_copy_(0, close, part)
        polypous.index_copy_(0, close, gradients)
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
