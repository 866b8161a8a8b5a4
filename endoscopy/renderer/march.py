"""Sphere tracing until the surface is reached, with steps as long as the folds allow."""

import math
from copy import copy
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from endoscopy.renderer.lumen import FAR, FOLD_SHARPNESS, Rays, field, polyp_ball
from endoscopy.renderer.scene import Scene

PIECES = 8
BLOCK = 2**15
"""Values that are computed together; larger arrays take longer to allocate than to fill."""


class AlongRays(Protocol):
    """A function of the distance along each of N rays."""

    def select(self, index: Tensor) -> None:
        """Keep these rays only."""

    def value(self, distance: Tensor) -> Tensor:
        """Return the values (..., N) at these distances (..., N)."""


class Bracket(NamedTuple):
    """An interval of each ray in which the function falls from positive to at most a little.

    Attributes:
        low: (N,) distance in mm.
        above: (N,) positive value there.
        high: (N,) larger distance.
        below: (N,) value there, negative or a little above zero.
    """

    low: Tensor
    above: Tensor
    high: Tensor
    below: Tensor

    def secant(self) -> Tensor:
        """Return where a straight line crosses zero; slightly beyond it if it does not quite."""
        share = self.above / (self.above - self.below).clamp(min=1e-9)
        return self.low + (self.high - self.low) * share

    def select(self, index: Tensor) -> Self:
        """Return these rays only."""
        return type(self)(*(part.index_select(0, index) for part in self))


def first_crossing(
    function: AlongRays, origin: Tensor, extent: Tensor, shares: Tensor
) -> tuple[Tensor, Bracket]:
    """Return which rays cross zero between two samples, and the first such interval.

    Args:
        function: The function; its values at the first samples count as positive.
        origin: (N,) distances from which the samples are counted.
        extent: (N,) lengths in which they are counted.
        shares: (K,) increasing, K < 256: the samples lie at ``origin + shares * extent``.
    """
    num_samples, num_rays = len(shares), len(origin)
    rows = max(1, BLOCK // max(num_rays, 1))
    values = torch.cat(
        [
            function.value(torch.addcmul(origin, extent, part.unsqueeze(1)))
            for part in shares.split(rows)
        ]
    )
    weights = torch.arange(num_samples, 0, -1, dtype=torch.uint8).unsqueeze(1)
    rank = (values < 0).view(torch.uint8).mul_(weights)[1:].amax(0)
    crossed = rank.nonzero().squeeze(1)
    below = num_samples - rank.index_select(0, crossed).long()  # the first sample below zero
    place = crossed + below * num_rays
    origin, extent = origin.index_select(0, crossed), extent.index_select(0, crossed)
    return crossed, Bracket(
        torch.addcmul(origin, extent, shares.index_select(0, below - 1)),
        values.view(-1).index_select(0, place - num_rays).clamp_(min=1e-6),
        torch.addcmul(origin, extent, shares.index_select(0, below)),
        values.view(-1).index_select(0, place),
    )


def close_in(function: AlongRays, bracket: Bracket, tolerance: float) -> Tensor:
    """Return the distance (N,) where a function first crosses zero on each ray, by secants.

    Args:
        function: The function; it is left as it was.
        bracket: One interval a ray.
        tolerance: Intervals are cut to pieces where the value at their secant exceeds this.
    """
    middle = bracket.secant()
    value = function.value(middle)
    slope = (bracket.above - value).clamp_(min=1e-6).div_((middle - bracket.low).clamp_(min=1e-6))
    result = middle + (value / slope).clamp_(-0.5, 0.5)
    order = (value.abs() >= tolerance).nonzero().squeeze(1)
    if len(order):
        function = copy(function)
        function.select(order)
        low, _, high, _ = bracket.select(order)
        shares = torch.linspace(0, 1, PIECES + 1)
        crossed, inner = first_crossing(function, low, high - low, shares)
        result.index_copy_(0, order.index_select(0, crossed), inner.secant())
    return result


TURN = 0.2  # radians around the center line
PASSES = 2
TURNING = 0.2  # growth of the slope of the center line within a step, relative to its maximum


class RayWall:
    """Rays in the coordinates in which the field of the wall is cheapest.

    x and y are turned so that the lobes of the folds start at zero; z is in units of the length of
    the bend. Constants are tensors of no dimension, which torch multiplies faster than numbers.

    Args:
        scene: The scene.
        rays: N rays.
    """

    def __init__(self, scene: Scene, rays: Rays) -> None:
        self.bent = scene.bend > 0
        cosine, sine = math.cos(scene.lobe_phase / 3), math.sin(scene.lobe_phase / 3)
        length = scene.bend_length
        self.bend_x = (cosine * scene.bend_x + sine * scene.bend_y) * length
        self.bend_y = (cosine * scene.bend_y - sine * scene.bend_x) * length
        self.fold = scene.radius * scene.fold_height
        self.decay = -0.5 / scene.fold_fade**2
        self.phase_rate = math.pi * length / scene.fold_period
        self.radius = torch.tensor(scene.radius)
        self.phase = torch.tensor(scene.fold_phase / 2)
        self.tiny, self.one = torch.tensor(1e-10), torch.tensor(1.0)
        self.lobe_mean, self.lobe_shift = torch.tensor(0.65), torch.tensor(-1.05)
        self.log_fold = torch.tensor(math.log(max(self.fold, 1e-12)) - 2 * FOLD_SHARPNESS)
        self.sharpness = torch.tensor(-FOLD_SHARPNESS)
        self.crest_mean = torch.tensor(self.fold * 1.05 * TURN)
        self.rows = self._prepare(scene, rays, cosine, sine)

    def _prepare(self, scene: Scene, rays: Rays, cosine: float, sine: float) -> list[Tensor]:
        """Return the constants of the rays, each (N,)."""
        x = rays.x * cosine + rays.y * sine + self.bend_x
        y = rays.y * cosine - rays.x * sine + self.bend_y
        dx, dy = rays.dx * cosine + rays.dy * sine, rays.dy * cosine - rays.dx * sine
        along = rays.dz.abs()
        from_base = rays.x - scene.radius
        squared = from_base.square().addcmul_(rays.y, rays.y).addcmul_(rays.z, rays.z)
        slope = (from_base * rays.dx).addcmul_(rays.y, rays.dy).addcmul_(rays.z, rays.dz)
        away = dx.square().addcmul_(dy, dy).sqrt_().add_(1e-4)
        if self.bent:
            away = away.add_(along, alpha=TURNING * scene.bend)
        else:
            away.reciprocal_()
        return [
            x, y, rays.z / scene.bend_length, dx, dy, rays.dz / scene.bend_length,
            squared.mul_(self.decay), slope.mul_(2 * self.decay),
            (along * (2 * math.pi / scene.fold_period)).add_(1e-6).reciprocal_(),
            away, along * scene.bend,
            (along * (1 / (TURNING * scene.bend_length))).add_(1e-6).reciprocal_(),
        ]  # fmt: skip

    def select(self, index: Tensor) -> None:
        """Keep these rays only."""
        self.rows = [row.index_select(0, index) for row in self.rows]

    def value(self, distance: Tensor) -> Tensor:
        """Return the field (..., N) at these distances (..., N)."""
        gap, lobes, cosine, _, _, _ = self._place(distance)
        base, slope = self.rows[6], self.rows[7]
        square = cosine.mul_(cosine)
        folds = torch.add(self.log_fold, square, alpha=2 * FOLD_SHARPNESS).exp_().mul_(lobes)
        fade = torch.addcmul(base, distance, torch.add(slope, distance, alpha=self.decay))
        return torch.addcmul(gap, folds, fade.exp_().sub_(self.one))

    def safe_step(self, distance: Tensor) -> Tensor:
        """Return how far (N,) rays at these distances (N,) may go without meeting the wall."""
        gap, lobes, cosine, rho, z, root = self._place(distance)
        per_phase, away, slant = self.rows[8], self.rows[9], self.rows[10]
        if self.bent:
            away = torch.addcmul(away, slant, z.abs_().div_(root)).reciprocal_()
        crest = torch.add(self.crest_mean, lobes, alpha=self.fold).clamp_(max=self.fold)
        half = torch.add(self.sharpness, cosine.abs(), alpha=FOLD_SHARPNESS).exp_().mul_(crest)
        until_phase = torch.addcmul(self.one, cosine, cosine, value=-1).clamp_(min=0).sqrt_()
        step = torch.minimum((gap - half).mul_(away), until_phase.mul_(per_phase))
        step = torch.maximum(step, (gap - crest).mul_(away))
        if self.bent:
            step = torch.minimum(step, self.rows[11])
        return torch.minimum(step, rho.mul_(away).mul_(TURN)).clamp_(min=0)

    def _place(self, distance: Tensor) -> tuple[Tensor, ...]:
        """Return gap to the unfolded wall, lobes, cosine of half the phase, rho, z and root."""
        x, y, z, dx, dy, dz = self.rows[:6]
        z = torch.addcmul(z, distance, dz)
        x, y = torch.addcmul(x, distance, dx), torch.addcmul(y, distance, dy)
        root = z
        if self.bent:
            root = torch.addcmul(self.one, z, z).sqrt_()
            x.sub_(root, alpha=self.bend_x)
            y.sub_(root, alpha=self.bend_y)
        rho = torch.addcmul(self.tiny, x, x).addcmul_(y, y).sqrt_()
        sideways = x.div_(rho)
        lobes = torch.add(self.lobe_shift, sideways * sideways, alpha=1.4)
        lobes = torch.addcmul(self.lobe_mean, lobes, sideways)
        cosine = torch.add(self.phase, z, alpha=self.phase_rate).cos_()
        return torch.sub(self.radius, rho), lobes, cosine, rho, z, root


def leave_open_tube(scene: Scene, rays: Rays) -> Tensor:
    """Return a distance (N,) that rays can go before they leave the tube inside all folds.

    The place relative to the center line moves on a straight line but for the bend, which moves it
    by at most bend / (2 bend_length) (c t)². Its distance from the center line is convex, so that a
    chord of it gives a safe step.
    """
    inner = scene.radius * (1 - scene.fold_height)
    curvature = rays.dz.square() * (0.5 * scene.bend / scene.bend_length) + 1e-9
    length = scene.bend_length
    distance = torch.zeros_like(rays.x)
    for _ in range(PASSES if scene.bend else 1):
        x, y, z = rays.at(distance)
        z = z / length
        root = (z.square() + 1).sqrt_()
        x = x.sub_(root - 1, alpha=scene.bend_x * length)
        y = y.sub_(root - 1, alpha=scene.bend_y * length)
        turning = z.div_(root).mul_(rays.dz)
        dx = torch.sub(rays.dx, turning, alpha=scene.bend_x)
        dy = torch.sub(rays.dy, turning, alpha=scene.bend_y)
        speed = dx.square().addcmul_(dy, dy).add_(1e-9)
        outward = (x * dx).addcmul_(y, dy)
        squared = x.square_().addcmul_(y, y)
        inside = torch.addcmul(outward.square(), speed, inner**2 - squared).clamp_(min=0)
        step = inside.sqrt_().sub_(outward).div_(speed)
        gap = (inner - squared.sqrt_()).clamp_(min=0)
        distance = distance + step * gap / torch.addcmul(gap, curvature, step.square())
    return distance.nan_to_num_(0.0).clamp_(max=FAR)


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
    whole = Bracket(*(torch.full_like(distance, end) for end in (FAR, 1.0, FAR, 0.0)))
    marching, order = copy(tube), torch.arange(len(distance))
    for count in ROUNDS:
        growth = (1 + LEAST_STEP) ** torch.arange(count + 1)
        crossed, bracket = first_crossing(marching, distance, distance, growth - 1)
        place = order.index_select(0, crossed)
        for all_rays, part in zip(whole, bracket, strict=True):
            all_rays.index_copy_(0, place, part)
        distance = distance * growth[-1]
        on = (distance < FAR).index_fill_(0, crossed, False)
        kept = on.nonzero().squeeze(1)
        if not len(kept):
            break
        marching.select(kept)
        order, distance = order.index_select(0, kept), distance.index_select(0, kept)
    return close_in(tube, whole, TOLERANCE).clamp_(max=FAR)


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
