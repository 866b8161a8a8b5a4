import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from endoscopy.renderer.lumen import polyp, smooth_minimum, wall
from endoscopy.renderer.scene import SHAPES, RendererConfig, draw_scene


def scenes(count, **settings):
    return [draw_scene(RendererConfig(seed=2, **settings), index) for index in range(count)]


def _extent(scene, axis):
    """Tangential extent of the polyp along y or z, over all its heights."""
    grid = torch.linspace(-12, 12, 2401)
    depth = torch.linspace(-0.05, scene.apex + 1, 400).unsqueeze(1)
    y, z = (grid, torch.zeros(1)) if axis == "y" else (torch.zeros(1), grid)
    sag = scene.radius - (scene.radius**2 - y.square()).clamp(min=0).sqrt()
    bent = 0.0 if SHAPES[scene.shape] == "pedunculated" else sag
    inside = polyp(scene, scene.radius - bent - depth, y, z) <= 0
    covered = grid[(inside & (depth >= 0)).any(0)]
    return (covered.max() - covered.min()).item()


def test_the_label_is_the_larger_axis_of_the_footprint():
    found = scenes(24)
    assert {scene.shape for scene in found} == {0, 1, 2}
    for scene in found:
        extents = _extent(scene, "y"), _extent(scene, "z")
        assert scene.size == max(scene.size_y, scene.size_z)
        assert scene.size_minor == min(scene.size_y, scene.size_z)
        assert extents == pytest.approx((scene.size_y, scene.size_z), abs=0.03)
        assert max(extents) == pytest.approx(scene.size, abs=0.03)


def test_balanced_sizes_are_log_uniform():
    sizes = np.array([scene.size for scene in scenes(1500)])
    assert 2 <= sizes.min() < 2.02
    assert 19.8 < sizes.max() <= 20
    shares = [(sizes <= 5).mean(), ((sizes > 5) & (sizes < 10)).mean(), (sizes >= 10).mean()]
    assert shares == pytest.approx([math.log10(2.5), math.log10(2), math.log10(2)], abs=0.04)


def test_real_frequencies():
    sizes = np.array([scene.size for scene in scenes(1500, frequencies="real")])
    shares = [(sizes <= 5).mean(), ((sizes > 5) & (sizes < 10)).mean(), (sizes >= 10).mean()]
    assert shares == pytest.approx([0.76, 0.14, 0.10], abs=0.035)


def test_shapes_have_their_frequencies_and_heights():
    found = scenes(1500)
    shares = [np.mean([scene.shape == kind for scene in found]) for kind in range(3)]
    assert shares == pytest.approx([0.45, 0.35, 0.20], abs=0.04)
    for scene in found:
        low, high = {0: (0.35, 0.60), 1: (0.15, 0.28), 2: (1, 1)}[scene.shape]
        assert low <= scene.height / scene.size <= high
        assert (scene.stalk > 0) == (SHAPES[scene.shape] == "pedunculated")
        assert scene.apex < 1.3 * scene.radius
        assert 0.63 < scene.size_minor / scene.size <= 1


def test_folds_have_the_height_of_their_formula(tube):
    scene = tube(fold_height=0.2, fold_period=20.0, fold_phase=0.0, lobe_phase=0.0)
    x, y = torch.tensor([-15.0, 15.0, -15.0]), torch.zeros(3)
    z = torch.tensor([100.0, 100.0, 110.0])  # two crests, one valley, far from the polyp
    expected = [20 * (1 - 0.2 * 0.3) - 15, 20 * (1 - 0.2) - 15, 20 - 15]
    assert_close(wall(scene, x, y, z).value, torch.tensor(expected), atol=1e-3, rtol=0)
    base = torch.tensor([19.9]), torch.zeros(1), torch.zeros(1)
    assert_close(wall(scene, *base).value, torch.tensor([0.1]), atol=0.01, rtol=0)


def test_the_smooth_minimum_is_the_minimum_where_they_differ():
    a, b = torch.tensor([1.0, 5.0, 2.0, -1.0]), torch.tensor([3.0, 1.0, 2.0, -1.2])
    assert_close(smooth_minimum(a, b, 0.5), torch.tensor([1.0, 1.0, 1.875, -1.245]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"side": 8}, "side must lie in 16-2048 pixels, got 8"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"shortcut_rho": 3.0}, "shortcut_rho must lie between -2 and 2, got 3.0"),
        ({"exposure": "auto"}, "exposure is 'auto'; choose one of fixed, agc"),
        ({"brand": "C"}, "brand is 'C'; choose one of A, B, mixed"),
    ],
)
def test_settings_out_of_range(settings, message, refused):
    refused(message, RendererConfig, **settings, error=ValueError)
