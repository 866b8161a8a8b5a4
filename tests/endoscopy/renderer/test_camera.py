import numpy as np
import pytest
import torch
from torch.testing import assert_close

from endoscopy.renderer.camera import CLEARANCE, draw_track
from endoscopy.renderer.lumen import field
from endoscopy.renderer.scene import RendererConfig, draw_scene


def tracks(count, **settings):
    config = RendererConfig(seed=6, **settings)
    for index in range(count):
        scene = draw_scene(config, index)
        yield scene, draw_track(config, index, scene)


def test_the_camera_keeps_its_clearance_from_every_surface():
    generator = torch.Generator().manual_seed(0)
    for scene, track in tracks(60):
        direction = torch.randn(2000, 3, generator=generator)
        direction /= direction.norm(dim=1, keepdim=True)
        radius = CLEARANCE * torch.rand(2000, 1, generator=generator).sqrt()
        points = track.position.unsqueeze(1) + torch.cat(
            [direction * CLEARANCE, direction * radius]
        )
        assert (field(scene, *points.unbind(-1)) > 0).all()


def test_distances_are_those_from_the_base_and_keep_their_bounds():
    for scene, track in tracks(60):
        base = torch.tensor([scene.radius, 0.0, 0.0])
        assert_close((track.position - base).norm(dim=1), track.distance, atol=1e-3, rtol=0)
        assert (track.distance >= 0.9 * scene.size + 4 - 1e-4).all()
        assert (track.distance < 30 * 1.2).all()
        step = track.distance.log().diff().abs()
        assert 0 <= step.max() < 0.2


def test_axes_are_right_handed_and_the_polyp_is_in_view():
    for scene, track in tracks(60):
        identity = torch.eye(3).expand(len(track.axes), 3, 3)
        assert_close(track.axes.transpose(1, 2) @ track.axes, identity, atol=1e-5, rtol=0)
        assert_close(torch.linalg.det(track.axes), torch.ones(len(track.axes)))
        middle = torch.tensor([scene.radius - scene.apex / 2, 0.0, 0.0])
        toward = torch.nn.functional.normalize(middle - track.position, dim=1)
        assert ((toward * track.axes[:, :, 2]).sum(1) > np.cos(np.radians(65))).all()


def _correlation(rho):
    pairs = [
        (np.log(scene.size), track.distance.log().median().item())
        for scene, track in tracks(120, shortcut_rho=rho, frames=1)
    ]
    return np.corrcoef(np.array(pairs).T)[0, 1]


def test_the_shortcut_ties_the_distance_to_the_size():
    negative, none, positive = (_correlation(rho) for rho in (-0.8, 0.0, 0.8))
    assert positive > 0.85
    assert negative < none - 0.3
    assert 0 < none < 0.7  # the bound keeps the camera away from large polyps


def test_large_polyps_on_stalks_are_seen_against_the_shortcut():
    config = RendererConfig(seed=3, shortcut_rho=-0.8)
    for index in (1022, 1112, 1387):  # no room at the distances that the shortcut asks for
        scene = draw_scene(config, index)
        track = draw_track(config, index, scene)
        assert (track.distance > 0.9 * scene.size + 4).all()


def test_brands():
    config = RendererConfig(seed=6, brand="mixed")
    names = [track.brand.name for _, track in tracks(60, brand="mixed", frames=1)]
    assert 15 < names.count("B") < 45
    scene = draw_scene(config, 1)
    a, b = (draw_track(RendererConfig(seed=6, brand=name), 1, scene) for name in ("A", "B"))
    assert torch.equal(a.position, b.position)
    assert b.brand.field_of_view > a.brand.field_of_view
    assert b.brand.gain < a.brand.gain


def test_a_scene_without_room_is_reported(tube):
    scene = tube(radius=2.0)
    with pytest.raises(RuntimeError, match="no free track for object 0 of seed 0"):
        draw_track(RendererConfig(), 0, scene)
