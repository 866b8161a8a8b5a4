"""The folded wall along rays: `geometry.field.wall` with all constants precomputed.

Also how far a ray may go without meeting the wall. The field is not a distance: across the flank of
a fold it falls four times faster. A step is safe if the wall cannot be met within it:

- In the directions that a ray can reach by turning a fifth of a radian around the center line, no
  fold is higher than ``crest``, so the wall lies at R - crest or beyond.
- The phase u of the folds, counted from the nearest crest, cannot come nearer to it than u / 2
  before the ray has gone u / (2 k c), with k = 2π / L and c = |dz|. Until then the wall lies at
  R - crest b(u / 2) or beyond. Between the folds that is almost R.
"""

import math

import torch
from torch import Tensor

from endoscopy.renderer.geometry.field import FOLD_SHARPNESS
from endoscopy.renderer.geometry.rays import FAR, Rays
from endoscopy.renderer.scene import Scene

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
