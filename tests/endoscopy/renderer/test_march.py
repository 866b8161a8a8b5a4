import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from benchmarks.endoscopy import fixed_march
from endoscopy.renderer.camera import draw_track
from endoscopy.renderer.lumen import FAR, Rays, camera_rays, field, fisheye, wall
from endoscopy.renderer.march import (
    Bracket,
    RayWall,
    close_in,
    first_crossing,
    leave_open_tube,
    march,
)
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


@pytest.mark.parametrize(("size", "distance"), [(4.0, 9.0), (10.0, 12.0), (18.0, 20.0)])
def test_a_sphere_subtends_what_it_must(tube, fan, size, distance):
    scene = tube(
        radius=24.0, shape=SHAPES.index("pedunculated"), size=size, size_minor=size, size_y=size,
        size_z=size, height=size, stalk=0.3 * size,
    )  # fmt: skip
    center = scene.radius - scene.stalk - size / 2
    degrees = torch.linspace(0, 60, 6001)
    hit = march(scene, fan((center, 0.0, -distance), (0, 0, 1), (0, 1, 0), degrees))
    sphere = hit < distance  # the near half; the wall lies behind
    edge = 2 * degrees[sphere].max()
    assert_close(edge.item(), math.degrees(2 * math.asin(size / (2 * distance))), atol=0.15, rtol=0)
    assert_close(hit[0].item(), distance - size / 2, atol=0.01, rtol=0)


def _first_crossing(scene, rays):
    """Distance to the surface by samples every 0.02 mm."""
    samples = torch.arange(0, 150, 0.02).unsqueeze(1)
    inside = torch.cat([field(scene, *rays.at(part)) for part in samples.split(500)]) < 0
    return torch.where(inside.any(0), samples[inside.int().argmax(0), 0], torch.inf)


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
    assert tube.value(distance).median() < 0.4 * start.median()
    assert (distance >= before).all()


def test_selected_rays_keep_their_values(case):
    scene, rays = case
    tube = RayWall(scene, rays)
    distance = torch.full_like(rays.x, 7.0)
    index = torch.tensor([5, 0, 17])
    expected = tube.value(distance)[index]
    tube.select(index)
    assert torch.equal(tube.value(distance[:3]), expected)


class Line:
    """Values of ``(root - distance) * slope * (1 + bow * distance)``."""

    def __init__(self, root, slope, bow):
        self.parts = root, slope, bow

    def select(self, index):
        self.parts = tuple(part[index] for part in self.parts)

    def value(self, distance):
        root, slope, bow = self.parts
        return (root - distance) * slope * (1 + bow * distance)


class Table:
    """Values at whole distances."""

    def __init__(self, values):
        self.values = values

    def select(self, index):
        self.values = self.values[:, index]

    def value(self, distance):
        return self.values.gather(0, distance.round().long())


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=5), min_size=1))
def test_the_first_crossing_is_found(table):
    values = torch.tensor(table).t()
    origin, extent = torch.zeros(len(table)), torch.full((len(table),), 4.0)
    crossed, bracket = first_crossing(Table(values), origin, extent, torch.linspace(0, 1, 5))
    expected = [ray for ray, column in enumerate(table) if min(column[1:]) < 0]
    assert crossed.tolist() == expected
    for place, ray in enumerate(expected):
        first = next(k for k in range(1, 5) if table[ray][k] < 0)
        assert (bracket.low[place], bracket.high[place]) == (first - 1, first)
        assert bracket.below[place] == values[first, ray] < 0 < bracket.above[place]


def test_many_samples_are_taken_in_blocks(monkeypatch):
    monkeypatch.setattr("endoscopy.renderer.march.BLOCK", 4)
    values = torch.tensor([[1.0, 1, -1, 1, 1], [1, 1, 1, 1, -1], [1, 1, 1, 1, 1]]).t()
    origin, extent = torch.zeros(3), torch.full((3,), 4.0)
    crossed, bracket = first_crossing(Table(values), origin, extent, torch.linspace(0, 1, 5))
    assert crossed.tolist() == [0, 1]
    assert bracket.high.tolist() == [2, 4]


def test_roots_are_closed_in_and_the_function_is_left_alone():
    root = torch.linspace(0.05, 0.95, 19)
    function = Line(root, torch.full((19,), 30.0), torch.linspace(-0.9, 5, 19))
    low, high = torch.zeros(19), torch.ones(19)
    bracket = Bracket(low, function.value(low), high, function.value(high))
    assert (bracket.secant() - root).abs().max() > 0.1
    assert_close(close_in(function, bracket, 0.02), root, atol=5e-3, rtol=0)
    assert len(function.parts[0]) == 19
