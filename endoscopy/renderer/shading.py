"""Radiance of the mucosa lit from next to the lens, linear, before the camera.

One light, two millimeters from the lens: diffuse reflection and a wet highlight, both falling
with the square of the distance from the light. Vessels and tint are sums of sines fixed in space.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from endoscopy.renderer.geometry.rays import FAR, Rays
from endoscopy.renderer.geometry.surface import Vectors, surface
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
