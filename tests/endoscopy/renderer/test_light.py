import math

import torch
from torch.testing import assert_close

from endoscopy.renderer.camera import CameraPath
from endoscopy.renderer.lumen import FAR, camera_rays, fisheye
from endoscopy.renderer.march import march
from endoscopy.renderer.render import LIGHT_POWER, degrade, render_radiance, shade
from endoscopy.renderer.scene import BRANDS


def _facing_wall(heights):
    """Cameras that look at the wall opposite to the polyp from these heights above it."""
    count = len(heights)
    position = torch.zeros(count, 3)
    position[:, 0] = torch.tensor(heights) - 200.0
    axes = torch.tensor([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # looks along -x
    distance = (position - torch.tensor([200.0, 0.0, 0.0])).norm(dim=1)
    return CameraPath(position, axes.expand(count, 3, 3).contiguous(), distance, BRANDS["A"])


def test_every_pixel_obeys_the_law_of_a_lambertian_cylinder(tube):
    scene = tube()
    track = _facing_wall([5.0])._replace(
        position=torch.tensor([[-3.0, 4.0, -60.0]]), axes=torch.eye(3).unsqueeze(0)
    )
    rays = camera_rays(fisheye(48, 140.0), track.position, track.axes)
    distance = march(scene, rays)
    light = tuple(torch.full_like(rays.x, v) for v in (-1.0, 4.0, -60.0))
    radiance, polypous = shade(scene, rays, light, distance)
    x, y, z = (part.double() for part in rays.at(distance))
    toward = torch.stack([-1.0 - x, 4.0 - y, -60.0 - z])
    reach = toward.norm(dim=0)
    facing = (-(x * toward[0] + y * toward[1]) / (20.0 * reach)).clamp(min=0)
    expected = 0.8 * LIGHT_POWER * facing / reach**2
    seen = (distance < 100) & ~polypous
    assert seen.float().mean() > 0.8
    assert_close(radiance[0, seen].double(), expected[seen], rtol=0.01, atol=1e-4)
    assert_close(radiance[1] / radiance[0].clamp(min=1e-9), (radiance[0] > 0) * (0.5 / 0.8))


def test_nothing_is_lit_where_there_is_nothing(tube):
    lens = fisheye(24, 140.0)
    rays = camera_rays(lens, torch.tensor([[0.0, 0.0, 5.0]]), torch.eye(3).unsqueeze(0))
    distance = march(tube(), rays)
    radiance, _ = shade(tube(specular=1.0), rays, (rays.x + 2, rays.y, rays.z), distance)
    gone = distance >= FAR
    assert gone.any()
    assert (radiance[:, gone] == 0).all()
    assert (radiance[:, ~gone] > 0).any()


def test_a_wet_wall_shines_where_it_mirrors_the_light(tube):
    track = _facing_wall([10.0])
    lens = fisheye(65, 140.0)
    dull, wet = (
        render_radiance(tube(radius=200.0, specular=s), track, lens).radiance for s in (0.0, 1.0)
    )
    shine = (wet - dull)[0, 0]
    assert_close(shine, (wet - dull)[2, 0])  # white, whatever the color of the wall
    brightest = int(shine.argmax())
    right, down = (lens.directions[k, brightest] / lens.directions[2, brightest] for k in (0, 1))
    assert abs(down) < 0.05
    assert_close(float(right) * 10, 1.0, atol=0.5, rtol=0)  # halfway between lens and light
    assert shine.max() > 0.9 * LIGHT_POWER / 101
    assert shine.quantile(0.5) < 1e-3
    assert math.isfinite(float(shine.sum()))


def _depth():
    far = torch.linspace(8, 60, 40).expand(2, 40, 40).clone()
    far[:, :3] = 0
    return far


def _degrade(depth, seed=0):
    return degrade(depth, torch.Generator().manual_seed(seed))


def test_inverse_depth_is_known_up_to_an_affine_map(monkeypatch):
    monkeypatch.setattr("endoscopy.renderer.render.NOISE", 0.0)
    depth = _depth()
    seen = _degrade(depth)
    inner = (slice(None), slice(5, -2), slice(2, -2))
    for frame, truth in zip(1 / seen[inner], 1 / depth[inner], strict=True):
        design = torch.stack([truth.flatten(), torch.ones(truth.numel())], 1)
        fit = torch.linalg.lstsq(design, frame.flatten().unsqueeze(1)).solution
        assert_close(design @ fit, frame.flatten().unsqueeze(1), rtol=0.02, atol=0)
        assert 0.45 < fit[0] < 1.55
        assert fit[1] > 0
    assert (seen - depth).abs()[inner].median() > 1


def test_maps_differ_between_frames_and_absent_depth_stays_absent():
    depth = _depth()
    seen = _degrade(depth)
    assert torch.equal(seen == 0, depth == 0)
    ratio = (seen / depth.clamp(min=1)).flatten(1).median(1).values
    assert abs(ratio[0] - ratio[1]) > 0.01
    assert torch.equal(seen, _degrade(depth))
    assert not torch.equal(seen, _degrade(depth, 1))
