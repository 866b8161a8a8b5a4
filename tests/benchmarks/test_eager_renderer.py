import pytest
import torch
from torch.testing import assert_close

from benchmarks.endoscopy import eager_radiance
from endoscopy.renderer.camera import draw_track
from endoscopy.renderer.lumen import FAR, fisheye
from endoscopy.renderer.march import march
from endoscopy.renderer.render import render_radiance
from endoscopy.renderer.scene import SHAPES, RendererConfig, draw_scene

CONFIG = RendererConfig(seed=12, frames=2)


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_fast_form_agrees_with_the_definition(shape, bent):
    scenes = (draw_scene(CONFIG, index) for index in range(100))
    index, scene = next(
        (index, scene)
        for index, scene in enumerate(scenes)
        if scene.shape == shape and (scene.bend > 0) == bent
    )
    track = draw_track(CONFIG, index, scene)
    lens = fisheye(40, track.brand.field_of_view)
    expected = eager_radiance(scene, track, lens, march)
    seen = render_radiance(scene, track, lens)
    assert torch.equal(seen.depth, expected.depth)
    assert (seen.mask ^ expected.mask).float().mean() < 2e-3
    bright = expected.radiance.clamp(min=0.02)
    error = ((seen.radiance - expected.radiance).abs() / bright).amax(0)
    assert error.quantile(0.98) < 0.02
    assert error.median() < 1e-3


def test_the_whole_square_holds_the_aperture():
    scene = draw_scene(CONFIG, 0)
    track = draw_track(CONFIG, 0, scene)
    lens, whole = (fisheye(24, track.brand.field_of_view, whole=w) for w in (False, True))
    assert whole.pixels.tolist() == list(range(24 * 24))
    inside, square = (eager_radiance(scene, track, part) for part in (lens, whole))
    assert_close(square.radiance[:, :, lens.pixels], inside.radiance, atol=1e-4, rtol=1e-3)
    assert_close(square.depth[:, lens.pixels], inside.depth, atol=1e-3, rtol=0)
    assert (square.depth <= FAR).all()
