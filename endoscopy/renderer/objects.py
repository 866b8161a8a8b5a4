"""Many objects in memory, as tensors for studies."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.render import RenderedObject, render_object


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
