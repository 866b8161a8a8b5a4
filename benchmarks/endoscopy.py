"""Frames read and rendered; steps of gradient routing and gated transformers against plain ones."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load, Work
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
    """The seam of a block, training steps, frames of the cache, rendered ones; on one thread."""
    yield gated_residual_norm()
    yield from map(gradient_routing, CASES)
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
EAGER_RENDERER, APERTURE, FRAMES_OURS = (
    "eager, 26 steps",
    "eager, 26 steps, aperture only",
    "render_object",
)
RENDERING_BAR = 0.5
OBJECTS = 8  # rendered one after the other, one per call


def frames() -> Comparison:
    """Return one object of six frames; ours may take half of the eager renderer's time."""

    def build(load: Load) -> Mapping[str, Call]:
        config = load("endoscopy.renderer.scene").RendererConfig(side=SIDE, frames=RENDERED)
        render = load("endoscopy.renderer.render").render_object
        eager = load("benchmarks.endoscopy").eager_radiance
        variants = {
            EAGER_RENDERER: lambda scene, track, lens: _square(load, scene, track, lens),
            APERTURE: eager,
        }

        def call(**radiance: Any) -> Call:
            indices = cycle(range(OBJECTS))
            return lambda: render(config, next(indices), **radiance)

        calls = {name: call(radiance=radiance) for name, radiance in variants.items()}
        return calls | {FRAMES_OURS: call()}

    return Comparison(
        name=f"colonoscopy frames of {SIDE} px, tracks of {RENDERED}",
        op="renderer",
        build=build,
        baseline=EAGER_RENDERER,
        bars={FRAMES_OURS: RENDERING_BAR},
        units=dict.fromkeys((EAGER_RENDERER, APERTURE, FRAMES_OURS), float(RENDERED)),
        unit="frame",
        rate="frames/s",
    )


def _square(load: Load, scene: Any, track: Any, lens: Any) -> Any:
    """Render the whole square and keep the pixels of the lens."""
    whole = load("endoscopy.renderer.lumen").fisheye(SIDE, track.brand.field_of_view, whole=True)
    seen = load("benchmarks.endoscopy").eager_radiance(scene, track, whole)
    return type(seen)(*(part[..., lens.pixels] for part in seen))


PLAIN = "plain step"
JOINT_BAR = 1.05


class Case(NamedTuple):
    """A network and how long its step may take.

    Attributes:
        preset: Function of `endoscopy.models`.
        stream: What it reads.
        channels: Channels of the stream.
        size: Pixels of a side.
        batch: Frames of a step.
        bar: Highest time of a dual step over a plain one.
    """

    preset: str
    stream: str
    channels: int
    size: int
    batch: int
    bar: float


CASES = (
    Case("tiny_resnet", "rgb_mask", 4, 64, 32, 1.75),
    Case("tiny_vit", "rgb_mask", 4, 64, 32, 1.75),
    Case("fsg_vit_tiny_patch16_384", "rgb", 3, 384, 2, 1.85),
)


def gradient_routing(case: Case) -> Comparison:
    """Return one step of the weights and gates in every mode.

    The plain step is a loop without gradient routing: one forward and backward pass and one AdamW
    over all parameters of the gated network.
    """

    def build(load: Load) -> Mapping[str, Call]:
        steps = {PLAIN: _plain(_Training(load, case))}
        for mode in ("joint", "dual", "reference"):
            steps[mode] = _routed(_Training(load, case), mode)
        steps["plain step without gates"] = _plain(_Training(load, case, gates="none"))
        return steps

    return Comparison(
        name=f"training step of {case.preset}, batch {case.batch}x{case.size}x{case.size}",
        op="gradient_routing",
        build=build,
        baseline=PLAIN,
        bars={"dual": case.bar, "joint": JOINT_BAR},
    )


class _Training:
    """A fresh network with a batch; ``load`` imports it, of this or another revision."""

    def __init__(self, load: Load, case: Case, gates: str = "fsg") -> None:
        torch.manual_seed(0)
        self.load = load
        preset = getattr(load("endoscopy.models"), case.preset)
        self.model: Any = preset((case.stream,), gates=gates)
        images = torch.randn(case.batch, case.channels, case.size, case.size)
        self.streams = {case.stream: images}
        self.mm = torch.linspace(2, 20, case.batch)
        self.target = load("endoscopy.training.targets").LogSize()

    def loss(self, model: Callable[..., Tensor]) -> Tensor:
        return cast(Tensor, self.target.loss(model(self.streams), self.mm))


def _plain(training: _Training) -> Call:
    optimizer = torch.optim.AdamW(training.model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        training.loss(training.model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _routed(training: _Training, mode: str) -> Call:
    kinds = training.load("endoscopy.models.trunks")
    weights = torch.optim.AdamW(kinds.weight_parameters(training.model).values(), 1e-3)
    gates = torch.optim.AdamW(kinds.gate_parameters(training.model).values(), 1e-2, weight_decay=0)
    routing = training.load("core_gates.training.gradient_routing").GradientRouting(
        weights, gates, mode=mode
    )
    return lambda: routing.step(training.model, training.loss)


SHAPE = (32, 577, 192)
"""Batch, tokens and features of ViT-Ti/16 at 384 pixels."""

EAGER, OURS = "eager", "gated_residual_norm"
COMPILED, CPP = f"{OURS}, compiled", f"{OURS}, C++"
BAR = 1 / 1.5
EPS = 1e-6
Operation = Callable[..., tuple[Tensor, Tensor]]


def gated_residual_norm(shape: tuple[int, int, int] = SHAPE) -> Comparison:
    """Return forward and backward; the op in its fastest form may take two thirds of eager."""

    def build(load: Load) -> Mapping[str, Call]:
        op = load("core_gates.ops.gated_residual_norm.op").gated_residual_norm
        kernels = load("core_gates.ops").kernels
        generator = torch.Generator().manual_seed(0)
        x, branch, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
        vectors = [torch.rand(shape[-1], generator=generator) for _ in range(3)]
        inputs = [tensor.requires_grad_() for tensor in (x, branch, *vectors)]

        def in_mode(mode: str) -> Operation:
            def call(*arguments: Tensor) -> tuple[Tensor, Tensor]:
                with kernels(mode):
                    return cast(tuple[Tensor, Tensor], op(*arguments, EPS))

            return call

        def gradients(function: Operation) -> Call:
            return lambda: torch.autograd.grad(function(*inputs), inputs, grads)

        return {
            EAGER: gradients(_eager),
            OURS: gradients(in_mode("reference")),
            COMPILED: gradients(in_mode("compile")),
            CPP: gradients(in_mode("cpp")),
        }

    return Comparison(
        name=f"gate + residual + LayerNorm forward+backward {'x'.join(map(str, shape))}",
        op="gated_residual_norm",
        build=build,
        baseline=EAGER,
        bars={CPP: BAR},
        work=Work(bytes=4.0 * math.prod(shape) * 10),  # reads 2 and 4 arrays, writes 2 and 2
        first_calls=(COMPILED, CPP),
    )


def _eager(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + scores * branch
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS)
