"""Frames: read from the cache, and rendered."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load
from endoscopy.renderer import render as shading
from endoscopy.renderer.camera import CameraPath
from endoscopy.renderer.lumen import (
    FAR,
    TAP,
    TETRAHEDRON,
    Lens,
    Rays,
    camera_rays,
    field,
    polyp,
    wall,
)
from endoscopy.renderer.render import Radiance
from endoscopy.renderer.scene import Scene

WIDTH, HEIGHT, SIZE = 1240, 1080, 384
FRAMES = 24
BARS = {"cache, raw": 1 / 10}
READS = {"decode + resize": 4, "cache, raw": FRAMES, "cache, jpeg": FRAMES}


def comparisons() -> Iterator[Comparison]:
    """Frames of the cache, then rendered ones; on one CPU thread."""
    yield cached_read()
    yield frames()


def cached_read() -> Comparison:
    """Return the read of a frame from both kinds of cache; the raw one may take a tenth."""

    def build(load: Load) -> Mapping[str, Call]:
        folder = tempfile.TemporaryDirectory(prefix="gates-cache-")
        root = Path(folder.name)
        table = _table(load, root)
        reader = load("endoscopy.data.frame_cache").FrameReader(table, SIZE)
        build_cache = load("endoscopy.data.frame_cache").FrameCache
        sources: dict[str, Any] = {"decode + resize": reader}
        for form in ("raw", "jpeg"):
            cache = build_cache(reader, range(FRAMES), root, form)
            cache.build()
            sources[f"cache, {form}"] = cache
        return {name: _read(source, READS[name], folder) for name, source in sources.items()}

    return Comparison(
        name=f"frame of {WIDTH} x {HEIGHT} to {SIZE} px",
        op="frame_cache",
        build=build,
        baseline="decode + resize",
        bars=BARS,
        units={name: float(count) for name, count in READS.items()},
        unit="frame",
        rate="frames/s",
    )


def _read(source: Any, count: int, folder: object) -> Call:
    """Read ``count`` frames; the folder lives as long as the call."""
    kept = SimpleNamespace(folder=folder)

    def call() -> object:
        assert kept.folder is not None
        return [source.read(row).image[0, 0, 0] for row in range(count)]

    return call


def _table(load: Load, root: Path) -> Any:
    import pandas as pd

    generator = np.random.default_rng(0)
    rows = []
    for number in range(FRAMES):
        coarse = generator.integers(40, 220, (12, 14, 3), dtype=np.uint8)
        field = np.asarray(
            Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        )
        grain = generator.normal(0.0, 3.0, (HEIGHT, WIDTH, 1))
        path = root / f"{number}.jpg"
        Image.fromarray((field + grain).clip(0, 255).astype(np.uint8)).save(path, quality=95)
        rows.append(
            {
                "database": "SUN",
                "unique_id": str(number),
                "frame_id": 0,
                "bbox_xmin": 100.0,
                "bbox_xmax": 300.0,
                "bbox_ymin": 100.0,
                "bbox_ymax": 300.0,
                "width": WIDTH,
                "height": HEIGHT,
                "frame_path": str(path),
                "gt": 5.0,
            }
        )
    return load("endoscopy.data.frame_table").FrameTable(pd.DataFrame(rows))


STEPS = 26
RELAXATION = 0.85


def fixed_march(scene: Scene, rays: Rays, steps: int = STEPS) -> Tensor:
    """Return the distance (N,) in mm that each ray has gone after all steps, at most `FAR`."""
    distance = torch.zeros_like(rays.x)
    for _ in range(steps):
        distance = distance + RELAXATION * field(scene, *rays.at(distance))
    return distance.clamp(0, FAR)


def eager_radiance(
    scene: Scene,
    track: CameraPath,
    lens: Lens,
    march: Callable[[Scene, Rays], Tensor] = fixed_march,
) -> Radiance:
    """Return linear radiance, depth and mask of every frame of a track.

    Args:
        scene: The scene.
        track: Poses of the camera.
        lens: Its pixels; the eager renderer of old took the whole square.
        march: Returns the length of every ray.
    """
    rays = camera_rays(lens, track.position, track.axes)
    distance = march(scene, rays)
    point = torch.stack(rays.at(distance))
    normal = _normals(scene, point)
    folded = wall(scene, *point)
    mask = polyp(scene, folded.x, folded.y, point[2]) < folded.value
    beside = track.position + shading.LIGHT_OFFSET * track.axes[:, :, 0]
    light = beside.t().repeat_interleave(len(lens.pixels), 1)
    toward = F.normalize(light - point, dim=0)
    falloff = shading.LIGHT_POWER / (light - point).square().sum(0)
    facing = (normal * toward).sum(0).clamp(min=0)
    waves = _waves(scene, point)
    ripple = F.normalize(scene.waves[6:, :3], dim=1).t() @ waves[6:]
    uneven = F.normalize(normal + shading.ROUGHNESS * ripple, dim=0)
    halfway = F.normalize(toward - torch.stack([rays.dx, rays.dy, rays.dz]), dim=0)
    shine = scene.specular * (uneven * halfway).sum(0).clamp(min=0) ** shading.SHININESS
    albedo = _albedo(scene, waves, mask)
    radiance = (albedo * facing + shine) * falloff * (distance < FAR)
    shape = (len(track.position), len(lens.pixels))
    return Radiance(radiance.view(3, *shape), distance.view(shape), mask.view(shape))


def _normals(scene: Scene, point: Tensor) -> Tensor:
    """Return the unit normals (3, N) at points (3, N)."""
    total = torch.zeros_like(point)
    for corner in torch.tensor(TETRAHEDRON).unsqueeze(2):
        total = total + corner * field(scene, *(point + TAP * corner))
    return F.normalize(total, dim=0)


def _waves(scene: Scene, point: Tensor) -> Tensor:
    """Return vessels, tint and fine waves, three rows each (9, N)."""
    phase = scene.waves[:, :3] @ point + scene.waves[:, 3:]
    tint = phase[3:6].sin()
    vessels = (phase[:3] + shading.WARP * tint).sin()
    fine = (phase[6:] + shading.WARP * tint).sin()
    return torch.cat([vessels, tint, fine])


def _albedo(scene: Scene, waves: Tensor, mask: Tensor) -> Tensor:
    """Return the reflectance (3, N) of mucosa and polyp."""
    vessel = torch.exp(-shading.VESSEL_SHARPNESS * (waves[0] + waves[1] + waves[2]) ** 2)
    vessel = scene.vessels * vessel * (0.6 + 0.4 * waves[3])
    vessel = vessel * torch.where(mask, shading.VESSELS_ON_POLYP, 1.0)
    tint = waves[4] + waves[5] + torch.where(mask, shading.POLYP_TINT, 0.0)
    tone = torch.where(mask, scene.polyp_tone * (1 + shading.PITS * waves[6] * waves[7]), 1.0)
    absorbed, tinted = (torch.tensor(v).unsqueeze(1) for v in (shading.VESSEL_COLOR, shading.TINT))
    albedo = torch.tensor(scene.albedo).unsqueeze(1)
    return albedo * tone * (1 - absorbed * vessel - tinted * tint)


SIDE = 64
RENDERED = 6
EAGER, APERTURE, OURS = "eager, 26 steps", "eager, 26 steps, aperture only", "render_object"
RENDERING_BAR = 0.5
OBJECTS = 8  # rendered one after the other, one per call


def frames() -> Comparison:
    """Return one object of six frames; ours may take half of the eager renderer's time."""

    def build(load: Load) -> Mapping[str, Call]:
        config = load("endoscopy.renderer.scene").RendererConfig(side=SIDE, frames=RENDERED)
        render = load("endoscopy.renderer.render").render_object
        eager = load("benchmarks.endoscopy.frames").eager_radiance
        variants = {
            EAGER: lambda scene, track, lens: _square(load, scene, track, lens),
            APERTURE: eager,
        }

        def call(**radiance: Any) -> Call:
            indices = cycle(range(OBJECTS))
            return lambda: render(config, next(indices), **radiance)

        calls = {name: call(radiance=radiance) for name, radiance in variants.items()}
        return calls | {OURS: call()}

    return Comparison(
        name=f"colonoscopy frames of {SIDE} px, tracks of {RENDERED}",
        op="renderer",
        build=build,
        baseline=EAGER,
        bars={OURS: RENDERING_BAR},
        units=dict.fromkeys((EAGER, APERTURE, OURS), float(RENDERED)),
        unit="frame",
        rate="frames/s",
    )


def _square(load: Load, scene: Any, track: Any, lens: Any) -> Any:
    """Render the whole square and keep the pixels of the lens."""
    whole = load("endoscopy.renderer.lumen").fisheye(SIDE, track.brand.field_of_view, whole=True)
    seen = load("benchmarks.endoscopy.frames").eager_radiance(scene, track, whole)
    return type(seen)(*(part[..., lens.pixels] for part in seen))
