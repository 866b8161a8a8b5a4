"""Frames of an object: radiance, depth and mask along the rays, then what the camera records."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from endoscopy.renderer.camera import Track, draw_track
from endoscopy.renderer.camera_response import expose
from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.depth import degrade
from endoscopy.renderer.march import march
from endoscopy.renderer.randomness import Purpose, torch_generator
from endoscopy.renderer.rays import FAR, Lens, Rays, camera_rays, fisheye
from endoscopy.renderer.scene import Scene, draw_scene
from endoscopy.renderer.shading import LIGHT_OFFSET, shade

CHUNK = 20480
"""Rays that are marched together: their arrays fit the cache, and no thread splits them."""

March = Callable[[Scene, Rays], Tensor]


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


class RenderedObject(NamedTuple):
    """The track of one object; T frames of H x W pixels.

    Attributes:
        number: Number of the object.
        scene: Its scene.
        track: Poses of the camera.
        images: (T, 3, H, W) uint8 RGB.
        depths: (T, H, W) float32 in mm along the ray, zero where there is none; arbitrary units if
            the configuration says ``relative``, zeros if ``none``.
        masks: (T, H, W) bool, True on the polyp; at least one pixel a frame.
        boxes: (T, 4) int64 xmin, ymin, xmax, ymax of the mask, edges of pixels.
        gains: (T,) gain of the exposure.
    """

    number: int
    scene: Scene
    track: Track
    images: Tensor
    depths: Tensor
    masks: Tensor
    boxes: Tensor
    gains: Tensor


def render_object(config: RendererConfig, index: int, march: March = march) -> RenderedObject:
    """Render the track of object ``index``; the bits depend on configuration and index alone.

    Args:
        config: What is rendered.
        index: Number of the object, from zero.
        march: Returns the length of every ray.

    Raises:
        ValueError: The index is negative.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    scene = draw_scene(config, index)
    track = draw_track(config, index, scene)
    return render_scene(config, index, scene, track, march)


def render_scene(
    config: RendererConfig, index: int, scene: Scene, track: Track, march: March = march
) -> RenderedObject:
    """Render a given scene from given poses; ``index`` decides the noise."""
    side = config.side
    lens = fisheye(side, track.brand.field_of_view)
    seen = render_radiance(scene, track, lens, march)
    sensor = torch_generator(config.seed, index, Purpose.SENSOR)
    images, gains = expose(seen.radiance, lens, side, track.brand, config.exposure, sensor)
    depths = _frames(torch.where(seen.depth < FAR, seen.depth, 0.0), lens, side)
    if config.depth == "relative":
        depths = degrade(depths, torch_generator(config.seed, index, Purpose.DEPTH))
    elif config.depth == "none":
        depths = torch.zeros_like(depths)
    masks = _frames(seen.mask | _projected(scene, track, lens, seen.mask), lens, side)
    boxes = torch.stack([_box(mask) for mask in masks])
    return RenderedObject(index, scene, track, images, depths, masks, boxes, gains)


def render_radiance(scene: Scene, track: Track, lens: Lens, march: March = march) -> Radiance:
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


def _projected(scene: Scene, track: Track, lens: Lens, mask: Tensor) -> Tensor:
    """Mark the pixel nearest to the middle of the polyp on frames (T, P) where it is too small."""
    missing = ~mask.any(1)
    marked = torch.zeros_like(mask)
    if missing.any():
        middle = torch.tensor([scene.radius - scene.apex / 2, 0.0, 0.0])
        toward = ((middle - track.position).unsqueeze(1) @ track.axes).squeeze(1)
        toward = toward / toward.norm(dim=1, keepdim=True)
        nearest = (toward @ lens.directions).argmax(1)
        marked[missing, nearest[missing]] = True
    return marked


def _frames(values: Tensor, lens: Lens, side: int) -> Tensor:
    """Put values (T, P) into frames (T, side, side), zero outside the aperture."""
    frames = values.new_zeros(len(values), side * side)
    return frames.index_copy_(1, lens.pixels, values).view(-1, side, side)


def _box(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.cat([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
