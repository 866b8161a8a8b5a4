import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.endoscopy.fixed_march import fixed_march
from endoscopy.renderer.camera import draw_track
from endoscopy.renderer.lumen import FAR, Rays, camera_rays, field, fisheye
from endoscopy.renderer.march import march
from endoscopy.renderer.scene import SHAPES, RendererConfig, draw_scene


def cylinder(rays, radius):
    """Distance to a cylinder around the z axis from inside, by the quadratic formula."""
    x, y, dx, dy = (v.double() for v in (rays.x, rays.y, rays.dx, rays.dy))
    a, b, c = dx**2 + dy**2, x * dx + y * dy, x**2 + y**2 - radius**2
    return ((b**2 - a * c).sqrt() - b) / a


def grazing(fan):
    """Rays at 5 to 90 degrees off the axis, away from the polyp, from the axis and off it."""
    degrees = torch.cat([torch.linspace(5, 10, 26), torch.linspace(10, 90, 41)])
    parts = [
        fan((x, y, 3.0), (0, 0, 1), (math.cos(turn), math.sin(turn), 0), degrees)
        for x, y in ((0.0, 0.0), (9.0, -3.0))
        for turn in (1.0, 2.5, 4.0)
    ]
    return Rays(*(torch.cat(part) for part in zip(*parts, strict=True)))


def test_a_plain_cylinder_is_met_where_the_formula_says(tube, fan):
    rays = grazing(fan)
    expected = cylinder(rays, 20.0)
    assert expected.max() > 200
    seen = march(tube(), rays)
    inside = expected < FAR
    assert_close(seen[inside].double(), expected[inside], rtol=0, atol=0.05)
    assert (seen[~inside] == FAR).all()


def test_the_fixed_march_misses_grazing_rays(tube, fan):
    rays = fan((0.0, 0.0, 3.0), (0, 0, 1), (-1, 0, 0), [5.0, 10.0, 90.0])
    short = cylinder(rays, 20.0) - fixed_march(tube(), rays).double()
    assert short[0] > 20
    assert 0.5 < short[1] < 5
    assert abs(short[2]) < 0.01


@pytest.mark.parametrize(("size", "distance"), [(4.0, 9.0), (10.0, 12.0), (18.0, 20.0)])
def test_a_sphere_subtends_what_it_must(tube, fan, size, distance):
    scene = tube(
        radius=24.0, shape=SHAPES.index("pedunculated"), size=size, size_minor=size, size_y=size,
        size_z=size, height=size, stalk=0.3 * size,
    )  # fmt: skip
    center = scene.radius - scene.stalk - size / 2
    degrees = torch.linspace(0, 60, 6001)
    rays = fan((center, 0.0, -distance), (0, 0, 1), (0, 1, 0), degrees)
    hit = march(scene, rays)
    sphere = hit < distance  # the near half; the wall lies behind
    edge = 2 * degrees[sphere].max()
    assert_close(edge.item(), math.degrees(2 * math.asin(size / (2 * distance))), atol=0.15, rtol=0)
    assert_close(hit[0].item(), distance - size / 2, atol=0.01, rtol=0)


def _first_crossing(scene, rays):
    """Distance to the surface by samples every 0.02 mm."""
    samples = torch.arange(0, 150, 0.02).unsqueeze(1)
    value = torch.cat([field(scene, *rays.at(part)) for part in samples.split(500)])
    inside = value < 0
    first = inside.int().argmax(0)
    return torch.where(inside.any(0), samples[first, 0], torch.inf)


def test_folds_and_polyps_are_met_first_and_exactly():
    wrong = fixed_wrong = total = 0
    for index in range(6):
        config = RendererConfig(seed=3, frames=1)
        scene = draw_scene(config, index)
        track = draw_track(config, index, scene)
        rays = camera_rays(fisheye(40, 140.0), track.position, track.axes)
        rays = Rays(*(part[::5] for part in rays))
        truth = _first_crossing(scene, rays)
        near = truth < 120
        wrong += ((march(scene, rays) - truth).abs()[near] > 0.1).sum().item()
        fixed_wrong += ((fixed_march(scene, rays) - truth).abs()[near] > 0.1).sum().item()
        total += int(near.sum())
    assert total > 1000
    assert wrong < 0.01 * total
    assert fixed_wrong > 3 * wrong


def test_rays_end_on_the_surface():
    config = RendererConfig(seed=4, frames=2)
    for index in range(4):
        scene = draw_scene(config, index)
        track = draw_track(config, index, scene)
        rays = camera_rays(fisheye(48, 140.0), track.position, track.axes)
        distance = march(scene, rays)
        left = field(scene, *rays.at(distance)).abs()[distance < FAR]
        assert left.quantile(0.99) < 0.02
        assert (distance > 1.5).all()
