"""Linear radiance, metric depth and mask along the rays of a track."""

from typing import NamedTuple

import torch
from torch import Tensor

from endoscopy.renderer.camera import CameraPath
from endoscopy.renderer.geometry.march import march
from endoscopy.renderer.geometry.rays import Lens, Rays, camera_rays
from endoscopy.renderer.scene import Scene
from endoscopy.renderer.shading import LIGHT_OFFSET, shade

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
