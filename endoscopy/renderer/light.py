"""Radiance of the mucosa lit from next to the lens, and depth as a monocular network returns it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from endoscopy.renderer.camera import CameraPath
from endoscopy.renderer.lumen import FAR, Lens, Rays, Vectors, camera_rays, surface
from endoscopy.renderer.march import march
from endoscopy.renderer.scene import Scene

LIGHT_OFFSET = 2.0
LIGHT_POWER = 260.0
SHININESS = 150.0
ROUGHNESS = 0.022
VESSEL_SHARPNESS = 16.0
VESSEL_COLOR = (0.10, 0.42, 0.34)  # fraction of red, green and blue that a vessel absorbs
VESSELS_ON_POLYP = 0.3
POLYP_TINT = 2.2
TINT = (0.0, 0.05, 0.04)
PITS = 0.1
WARP = 1.3


def shade(scene: Scene, rays: Rays, light: Vectors, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the radiance (3, N) at the ends of the rays, and which (N,) of them are polyp.

    Args:
        scene: The scene.
        rays: N rays.
        light: Position of the light of each ray, three components (N,) in mm.
        distance: (N,) length of the rays in mm; those of `FAR` stay dark.
    """
    x, y, z = rays.at(distance)
    normal, polypous = surface(scene, x, y, z)
    toward = (light[0] - x, light[1] - y, light[2] - z)
    squared = _dot(toward, toward)
    reach = squared.sqrt()
    toward = (toward[0].div_(reach), toward[1].div_(reach), toward[2].div_(reach))
    falloff = squared.reciprocal_().mul_(distance < FAR).mul_(LIGHT_POWER)
    facing = _dot(normal, toward).clamp_(min=0)
    waves = _waves(scene, x, y, z)
    shine = _highlight(scene, rays, normal, toward, waves).mul_(falloff)
    share = polypous.float()
    tissue = (share * (scene.polyp_tone - 1)).add_(1).mul_(falloff).mul_(facing)
    pits = (waves[6] * waves[7]).mul_(share).mul_(PITS)
    tissue = torch.addcmul(tissue, tissue, pits)
    vessel = (waves[0] + waves[1]).add_(waves[2]).square_().mul_(-VESSEL_SHARPNESS).exp_()
    vessel = vessel.mul_(waves[3].mul(0.4).add_(0.6)).mul_(share.mul(VESSELS_ON_POLYP - 1).add_(1))
    tint = (waves[4] + waves[5]).addcmul_(share, torch.tensor(POLYP_TINT))
    colors = [
        torch.sub(1, vessel, alpha=absorbed * scene.vessels)
        .sub_(tint, alpha=tinted)
        .mul_(tissue)
        .mul_(albedo)
        .add_(shine)
        for albedo, absorbed, tinted in zip(scene.albedo, VESSEL_COLOR, TINT, strict=True)
    ]
    return torch.stack(colors), polypous


def _waves(scene: Scene, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """Return the waves of the texture; those of the tint bend the others, as tissue does."""
    table = scene.waves.tolist()
    phases = [
        torch.add(x * along[0], y, alpha=along[1]).add_(z, alpha=along[2]).add_(along[3])
        for along in table
    ]
    tint = [phase.sin_() for phase in phases[3:6]]
    vessels = [
        phase.add_(bend, alpha=WARP).sin_() for phase, bend in zip(phases, tint, strict=False)
    ]
    fine = [
        phase.add_(bend, alpha=WARP).sin_() for phase, bend in zip(phases[6:], tint, strict=False)
    ]
    return [*vessels, *tint, *fine]


def _highlight(
    scene: Scene, rays: Rays, normal: Vectors, toward: Vectors, waves: list[Tensor]
) -> Tensor:
    """Return the Blinn-Phong term of a surface that fine waves make uneven."""
    halfway = (toward[0] - rays.dx, toward[1] - rays.dy, toward[2] - rays.dz)
    ripple = (F.normalize(scene.waves[6:, :3], dim=1) * ROUGHNESS).tolist()
    first, second, third = (
        torch.add(axis, waves[6], alpha=ripple[0][i])
        .add_(waves[7], alpha=ripple[1][i])
        .add_(waves[8], alpha=ripple[2][i])
        for i, axis in enumerate(normal)
    )
    uneven = (first, second, third)
    cosine = _dot(uneven, halfway).clamp_(min=1e-3)
    squared = cosine.square_().div_(_dot(halfway, halfway)).div_(_dot(uneven, uneven))
    return squared.clamp_(max=1).log_().mul_(SHININESS / 2).exp_().mul_(scene.specular)


def _dot(a: Vectors, b: Vectors) -> Tensor:
    return (a[0] * b[0]).addcmul_(a[1], b[1]).addcmul_(a[2], b[2])


CHUNK = 20480
"""Rays that are marched together: their arrays fit the cache, and no thread splits them."""


class Radiance(NamedTuple):
    """What reaches the lens, linear, before vignetting, exposure and noise.

    Attributes:
        radiance: (3, T, P) of the P pixels inside the aperture.
        depth: (T, P) distance along the ray in mm; `FAR` where there is nothing.
        mask: (T, P) True on the polyp.
    """

    radiance: Tensor
    depth: Tensor
    mask: Tensor


def render_radiance(scene: Scene, track: CameraPath, lens: Lens) -> Radiance:
    """Return linear radiance, depth and mask of every frame of a track."""
    rays = camera_rays(lens, track.position, track.axes)
    num_frames, num_pixels = len(track.position), len(lens.pixels)
    beside = track.position + LIGHT_OFFSET * track.axes[:, :, 0]
    light = beside.t().unsqueeze(2).expand(3, num_frames, num_pixels).flatten(1)
    parts = []
    for start in range(0, num_frames * num_pixels, CHUNK):
        chunk = Rays(*(component[start : start + CHUNK] for component in rays))
        x, y, z = light[:, start : start + CHUNK]
        distance = march(scene, chunk)
        parts.append((*shade(scene, chunk, (x, y, z), distance), distance))
    radiance, mask, depth = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return Radiance(
        radiance.view(3, num_frames, num_pixels),
        depth.view(num_frames, num_pixels),
        mask.view(num_frames, num_pixels),
    )


NOISE = 0.03
NEAREST = 1.0


def degrade(depth: Tensor, rng: torch.Generator) -> Tensor:
    """Return the true depth after an unknown affine map of its inverse.

    Args:
        depth: (T, H, W) distance along the ray in mm, zero where there is none.
        rng: For map and noise.

    Returns:
        (T, H, W) in arbitrary units up to `FAR`, zero where there is none.
    """
    present = (depth > 0).float()
    inverse = present / depth.clamp(min=NEAREST)
    blurred = _smooth(inverse) / _smooth(present).clamp(min=1e-6)
    typical = blurred.flatten(1).amax(1).view(-1, 1, 1)
    scale, shift = torch.rand(2, len(depth), 1, 1, generator=rng)
    noise = torch.randn(depth.shape, generator=rng) * NOISE
    mapped = (0.5 + scale) * blurred * (1 + noise) + (0.02 + 0.2 * shift) * typical
    return (1 / mapped.clamp(1 / FAR, 1 / NEAREST)) * present


def _smooth(frames: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel.unsqueeze(0) * kernel.unsqueeze(1)).view(1, 1, 3, 3)
    return F.conv2d(frames.unsqueeze(1), kernel, padding=1).squeeze(1)
