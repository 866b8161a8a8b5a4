"""Frames of one object or of many: rays, their radiance, then what the camera records."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.errors import check_at_least
from endoscopy.data.streams import boxes_of
from endoscopy.renderer.camera import CameraPath, draw_track, expose
from endoscopy.renderer.light import Radiance, degrade, render_radiance
from endoscopy.renderer.lumen import FAR, Lens, fisheye
from endoscopy.renderer.scene import Purpose, RendererConfig, Scene, draw_scene, torch_generator

MakeRadiance = Callable[[Scene, CameraPath, Lens], Radiance]


class RenderedObject(NamedTuple):
    """The track of one object; T frames of H x W pixels.

    Attributes:
        number: Number of the object.
        scene: Its scene.
        track: Poses of the camera.
        images: (T, 3, H, W) uint8 RGB.
        depths: (T, H, W) float32 in mm along the ray, zero where there is none; arbitrary units if
            the configuration says ``relative``, zeros if ``none``.
        masks: (T, H, W) bool, True on the polyp; at least one pixel per frame.
        boxes: (T, 4) int64 xmin, ymin, xmax, ymax of the mask, edges of pixels.
        gains: (T,) gain of the exposure.
    """

    number: int
    scene: Scene
    track: CameraPath
    images: Tensor
    depths: Tensor
    masks: Tensor
    boxes: Tensor
    gains: Tensor


def render_object(
    config: RendererConfig, index: int, radiance: MakeRadiance = render_radiance
) -> RenderedObject:
    """Render the track of object ``index``; the bits depend on configuration and index alone.

    Args:
        config: What is rendered.
        index: Number of the object, from zero.
        radiance: Returns what reaches the lens.

    Raises:
        ValueError: The index is negative.
    """
    check_at_least(0, index=index)
    scene = draw_scene(config, index)
    track = draw_track(config, index, scene)
    return render_scene(config, index, scene, track, radiance)


def render_scene(
    config: RendererConfig,
    index: int,
    scene: Scene,
    track: CameraPath,
    radiance: MakeRadiance = render_radiance,
) -> RenderedObject:
    """Render a given scene from given poses; ``index`` decides the noise."""
    side = config.side
    lens = fisheye(side, track.brand.field_of_view)
    with torch.inference_mode():  # smaller arrays for every operation
        seen = radiance(scene, track, lens)
        sensor = torch_generator(config.seed, index, Purpose.SENSOR)
        images, gains = expose(seen.radiance, lens, side, track.brand, config.exposure, sensor)
        depths = _frames(seen.depth.masked_fill(seen.depth >= FAR, 0.0), lens, side)
        if config.depth == "relative":
            depths = degrade(depths, torch_generator(config.seed, index, Purpose.DEPTH))
        elif config.depth == "none":
            depths = torch.zeros_like(depths)
        masks = _frames(seen.mask | _projected(scene, track, lens, seen.mask), lens, side)
    boxes = torch.from_numpy(boxes_of(masks.numpy())).long()
    recorded = (one.clone() for one in (images, depths, masks, boxes, gains))
    return RenderedObject(index, scene, track, *recorded)


def _projected(scene: Scene, track: CameraPath, lens: Lens, mask: Tensor) -> Tensor:
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


class RenderedObjects(NamedTuple):
    """B objects with T frames each.

    Attributes:
        number: (B,) int64 numbers of the objects.
        images: (B, T, 3, H, W) uint8 RGB.
        masks: (B, T, H, W) bool, True on the polyp.
        depths: (B, T, H, W) float32 in mm along the ray, zero where there is none.
        boxes: (B, T, 4) int64 xmin, ymin, xmax, ymax, edges of pixels.
        size_mm: (B,) float32 larger axis of the footprint, the label.
        size_minor_mm: (B,) float32 smaller axis.
        shape: (B,) int64 index into `endoscopy.renderer.scene.SHAPES`.
        distance_mm: (B, T) float32 distance of the camera from the base of the polyp.
        gains: (B, T) float32 gain of the exposure.
        brand: Name of the endoscope of every object.
    """

    number: Tensor
    images: Tensor
    masks: Tensor
    depths: Tensor
    boxes: Tensor
    size_mm: Tensor
    size_minor_mm: Tensor
    shape: Tensor
    distance_mm: Tensor
    gains: Tensor
    brand: tuple[str, ...]


def render_objects(
    config: RendererConfig,
    indices: Iterable[int],
    *,
    tick: Callable[[int], None] | None = None,
) -> RenderedObjects:
    """Render objects; each depends on the configuration and its own index alone.

    Args:
        config: What is rendered.
        indices: Numbers of the objects.
        tick: Called with the number of finished objects after each.

    Raises:
        ValueError: There is no index, or a negative one.
    """
    objects: list[RenderedObject] = []
    for count, index in enumerate(indices, 1):
        objects.append(render_object(config, index))
        if tick is not None:
            tick(count)
    if not objects:
        raise ValueError("indices must name at least one object")
    return RenderedObjects(
        number=torch.tensor([item.number for item in objects]),
        images=torch.stack([item.images for item in objects]),
        masks=torch.stack([item.masks for item in objects]),
        depths=torch.stack([item.depths for item in objects]),
        boxes=torch.stack([item.boxes for item in objects]),
        size_mm=torch.tensor([item.scene.size for item in objects]),
        size_minor_mm=torch.tensor([item.scene.size_minor for item in objects]),
        shape=torch.tensor([item.scene.shape for item in objects]),
        distance_mm=torch.stack([item.track.distance for item in objects]),
        gains=torch.stack([item.gains for item in objects]),
        brand=tuple(item.track.brand.name for item in objects),
    )
