"""Radiance of the mucosa lit from next to the lens, and depth as a monocular network returns it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_at_least
from endoscopy.data.streams import boxes_of
from endoscopy.renderer.camera import CameraPath, draw_track, expose
from endoscopy.renderer.lumen import FAR, Lens, Rays, Vectors, camera_rays, fisheye, surface
from endoscopy.renderer.march import march
from endoscopy.renderer.scene import Purpose, RendererConfig, Scene, draw_scene, torch_generator

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
    recorded = (recorded_part.clone() for recorded_part in (images, depths, masks, boxes, gains))
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
