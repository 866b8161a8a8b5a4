"""Sphere tracing until the surface is reached, with steps as long as the folds allow.

Every ray first leaves the tube inside all folds, then takes the steps of
`ray_wall` that cannot meet the wall, but at least `LEAST_STEP` of the way gone,
half a pixel of a small frame. Where it ends below the surface, it has crossed it since the last
point, and the crossing is refined. After `SAFE_STEPS` the rays continue by the smallest step,
several steps at once, and the few rays that pass the polyp sample their way through a ball around
it.
"""

from copy import copy

import torch
from torch import Tensor

from endoscopy.renderer.geometry.crossing import Bracket, close_in, first_crossing
from endoscopy.renderer.geometry.field import field
from endoscopy.renderer.geometry.ray_wall import RayWall, leave_open_tube
from endoscopy.renderer.geometry.rays import FAR, Rays
from endoscopy.renderer.geometry.surface import polyp_ball
from endoscopy.renderer.scene import Scene

TOLERANCE = 0.02
SAFE_STEPS = 2
LEAST_STEP = 0.025
ROUNDS = (4, 10, 20, 32, 32, 32, 32, 32)
POLYP_SAMPLES = 10


def march(scene: Scene, rays: Rays) -> Tensor:
    """Return the distance (N,) in mm to the first surface along each ray; `FAR` if there is none.

    Args:
        scene: The scene.
        rays: N rays that start in the lumen.
    """
    distance = _to_wall(scene, rays)
    near, start, end = _through_ball(scene, rays, distance)
    if len(near):
        passing = _Surface(scene, _select(rays, near))
        shares = torch.linspace(0, 1, POLYP_SAMPLES + 1)
        crossed, bracket = first_crossing(passing, start, end - start, shares)
        passing.select(crossed)
        distance[near[crossed]] = close_in(passing, bracket, TOLERANCE)
    return distance


class _Surface:
    """Wall and polyp along rays."""

    def __init__(self, scene: Scene, rays: Rays) -> None:
        self.scene, self.rays = scene, rays

    def select(self, index: Tensor) -> None:
        self.rays = _select(self.rays, index)

    def value(self, distance: Tensor) -> Tensor:
        return field(self.scene, *self.rays.at(distance))


def _to_wall(scene: Scene, rays: Rays) -> Tensor:
    """March to the wall alone, as if there were no polyp."""
    tube = RayWall(scene, rays)
    distance = leave_open_tube(scene, rays)
    for _ in range(SAFE_STEPS):
        distance = distance + tube.safe_step(distance)
    found = Bracket(*(torch.full_like(distance, end) for end in (FAR, 1.0, FAR, 0.0)))
    marching, order = copy(tube), torch.arange(len(distance))
    for count in ROUNDS:
        growth = (1 + LEAST_STEP) ** torch.arange(count + 1)
        crossed, bracket = first_crossing(marching, distance, distance, growth - 1)
        place = order.index_select(0, crossed)
        for all_rays, part in zip(found, bracket, strict=True):
            all_rays.index_copy_(0, place, part)
        distance = distance * growth[-1]
        on = (distance < FAR).index_fill_(0, crossed, False)
        kept = on.nonzero().squeeze(1)
        if not len(kept):
            break
        marching.select(kept)
        order, distance = order.index_select(0, kept), distance.index_select(0, kept)
    return close_in(tube, found, TOLERANCE).clamp_(max=FAR)


def _through_ball(scene: Scene, rays: Rays, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rays pass the ball around the polyp before ``end``, and from where to where."""
    ball = polyp_ball(scene)
    x = rays.x - ball.x
    middle = (x * rays.dx).addcmul_(rays.y, rays.dy).addcmul_(rays.z, rays.dz).neg_()
    outside = x.square_().addcmul_(rays.y, rays.y).addcmul_(rays.z, rays.z).sub_(ball.radius**2)
    half = torch.addcmul(outside, middle, middle, value=-1).neg_().clamp_(min=0).sqrt_()
    low, high = (middle - half).clamp_(min=0), torch.minimum(middle.add_(half), end)
    near = (high - low > 1e-3).nonzero().squeeze(1)
    low, high = low.index_select(0, near), high.index_select(0, near)
    rising = rays.dx.index_select(0, near)
    level = (ball.top - rays.x.index_select(0, near)) / rising
    low = torch.where(rising > 0, torch.maximum(low, level), low)
    high = torch.where(rising < 0, torch.minimum(high, level), high)
    passing = (high > low).nonzero().squeeze(1)
    return near[passing], low[passing], high[passing]


def _select(rays: Rays, index: Tensor) -> Rays:
    return Rays(*(component.index_select(0, index) for component in rays))
