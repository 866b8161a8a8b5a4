import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from endoscopy.renderer.camera import draw_track
from endoscopy.renderer.lumen import (
    FAR,
    camera_rays,
    field,
    fisheye,
    polyp,
    polyp_ball,
    surface,
    wall,
    wall_gradient,
)
from endoscopy.renderer.march import march
from endoscopy.renderer.scene import RendererConfig, draw_scene


@pytest.fixture(params=range(5))
def seen(request):
    config = RendererConfig(seed=21, frames=2)
    scene = draw_scene(config, request.param)
    track = draw_track(config, request.param, scene)
    rays = camera_rays(fisheye(40, 140.0), track.position, track.axes)
    distance = march(scene, rays)
    return scene, [part[distance < FAR] for part in rays.at(distance)]


def _gradient(function, points):
    points = [part.double().requires_grad_() for part in points]
    return torch.stack(torch.autograd.grad(function(*points).sum(), points))


def test_the_gradient_of_the_wall_is_its_derivative(seen):
    scene, points = seen
    expected = _gradient(lambda x, y, z: wall(scene, x, y, z).value, points)
    seen = torch.stack(wall_gradient(scene, *points)).double()
    assert_close(seen, expected, atol=2e-4, rtol=2e-4)


def test_normals_are_those_of_the_field(seen):
    scene, points = seen
    normal = torch.stack(surface(scene, *points)[0])
    expected = F.normalize(_gradient(lambda x, y, z: field(scene, x, y, z), points), dim=0)
    assert_close(normal.norm(dim=0), torch.ones(len(points[0])))
    error = (normal.double() - expected).norm(dim=0)
    assert error.quantile(0.98) < 0.02
    assert error.median() < 1e-3


def test_polyp_points_are_nearer_to_the_polyp_than_to_the_wall(seen):
    scene, points = seen
    _, found = surface(scene, *points)
    folded = wall(scene, *points)
    apart = polyp(scene, folded.x, folded.y, points[2])
    certain = (apart - folded.value).abs() > 1e-3
    assert found.any()
    assert torch.equal(found[certain], (apart < folded.value)[certain])


def test_outside_the_ball_there_is_only_wall(seen):
    scene, points = seen
    ball = polyp_ball(scene)
    x, y, z = points
    outside = (((x - ball.x) ** 2 + y**2 + z**2).sqrt() > ball.radius) | (x < ball.top)
    assert outside.any()
    assert_close(field(scene, *points)[outside], wall(scene, *points).value[outside])
