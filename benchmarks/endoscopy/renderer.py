"""Rendering tracks of frames against the eager renderer with 26 steps, in one process.

The eager renderer does the same operations on every pixel of the square frame. Its second row
spares the corners outside the aperture. All rows share scenes and the response of the camera.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from benchmarks.registry import Call, Comparison, Load

SIDE = 64
FRAMES = 6
EAGER, APERTURE, OURS = "eager, 26 steps", "eager, 26 steps, aperture only", "render_object"
BAR = 0.5
OBJECTS = 8  # rendered one after the other, one per call


def frames() -> Comparison:
    """Return one object of six frames; ours may take half of the eager renderer's time."""

    def build(load: Load) -> Mapping[str, Call]:
        config = load("endoscopy.renderer.scene").RendererConfig(side=SIDE, frames=FRAMES)
        render = load("endoscopy.renderer.render").render_object
        eager = load("benchmarks.endoscopy.eager_renderer").eager_radiance
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
        name=f"colonoscopy frames of {SIDE} px, tracks of {FRAMES}",
        op="renderer",
        build=build,
        baseline=EAGER,
        bars={OURS: BAR},
        units=dict.fromkeys((EAGER, APERTURE, OURS), float(FRAMES)),
        unit="frame",
        rate="frames/s",
    )


def _square(load: Load, scene: Any, track: Any, lens: Any) -> Any:
    """Render the whole square and keep the pixels of the lens."""
    whole = load("endoscopy.renderer.lumen").fisheye(SIDE, track.brand.field_of_view, whole=True)
    seen = load("benchmarks.endoscopy.eager_renderer").eager_radiance(scene, track, whole)
    return type(seen)(*(part[..., lens.pixels] for part in seen))
