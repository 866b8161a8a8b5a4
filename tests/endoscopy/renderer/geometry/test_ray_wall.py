import pytest
import torch
from torch.testing import assert_close

from endoscopy.renderer.camera import draw_track
from endoscopy.renderer.lumen import camera_rays, fisheye, wall
from endoscopy.renderer.march import RayWall, leave_open_tube
from endoscopy.renderer.scene import RendererConfig, draw_scene

CASES = range(8, 14)


@pytest.fixture(params=CASES)
def case(request):
    config = RendererConfig(seed=8, frames=2)
    scene = draw_scene(config, request.param)
    track = draw_track(config, request.param, scene)
    return scene, camera_rays(fisheye(24, 140.0), track.position, track.axes)


def _lowest(scene, rays, begin, length):
    """Least value of the wall within the steps, by samples."""
    share = torch.linspace(0, 1, 200).unsqueeze(1)
    return wall(scene, *rays.at(begin + length * share)).value.amin(0)


def test_the_value_is_that_of_the_definition(case):
    scene, rays = case
    distance = torch.rand(3, len(rays.x), generator=torch.Generator().manual_seed(0)) * 60
    expected = wall(scene, *rays.at(distance)).value
    assert_close(RayWall(scene, rays).value(distance), expected, atol=1e-3, rtol=1e-5)


def test_half_of_the_tubes_are_bent():
    bent = [draw_scene(RendererConfig(seed=8), index).bend > 0 for index in range(40)]
    assert 10 < sum(bent) < 30
    assert 0 < sum(draw_scene(RendererConfig(seed=8), index).bend > 0 for index in CASES) < 6


def test_the_open_tube_holds_no_wall(case):
    scene, rays = case
    zero = torch.zeros_like(rays.x)
    step = leave_open_tube(scene, rays)
    assert _lowest(scene, rays, zero, step).min() > -1e-3
    assert step.median() > 3


def test_safe_steps_meet_no_wall_and_get_somewhere(case):
    scene, rays = case
    tube = RayWall(scene, rays)
    distance = leave_open_tube(scene, rays)
    start = tube.value(distance)
    for _ in range(4):
        step = tube.safe_step(distance)
        assert _lowest(scene, rays, distance, step).min() > -2e-3
        before, distance = distance, distance + step
    left = tube.value(distance)
    assert left.median() < 0.4 * start.median()
    assert (distance >= before).all()


def test_selected_rays_keep_their_values(case):
    scene, rays = case
    tube = RayWall(scene, rays)
    distance = torch.full_like(rays.x, 7.0)
    index = torch.tensor([5, 0, 17])
    expected = tube.value(distance)[index]
    tube.select(index)
    assert torch.equal(tube.value(distance[:3]), expected)
