import numpy as np
import pytest
import torch
from torch.testing import assert_close

from endoscopy.renderer.camera import (
    CLEARANCE,
    _blur,
    draw_track,
    expose,
    gains,
    mean_luminance,
    tone,
    vignetting,
)
from endoscopy.renderer.lumen import field, fisheye
from endoscopy.renderer.scene import BRANDS, RendererConfig, draw_scene


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
        assert 0 <= track.distance.log().diff().abs().max() < 0.2


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
        assert (draw_track(config, index, scene).distance > 0.9 * scene.size + 4).all()


def test_brands():
    config = RendererConfig(seed=6, brand="mixed")
    names = [track.brand.name for _, track in tracks(60, brand="mixed", frames=1)]
    assert 15 < names.count("B") < 45
    scene = draw_scene(config, 1)
    a, b = (draw_track(RendererConfig(seed=6, brand=name), 1, scene) for name in ("A", "B"))
    assert torch.equal(a.position, b.position)
    assert b.brand.field_of_view > a.brand.field_of_view
    gray = torch.full((3, 1, len(LENS.pixels)), 0.4)
    dimmer = (record(gray, "A")[0].float() - record(gray, "B")[0]).mean((0, 2, 3))
    assert dimmer[0] > dimmer[2] > 3


def test_a_scene_without_room_is_reported(tube, refused):
    scene = tube(radius=2.0)
    refused(
        "no free track for object 0 of seed 0",
        draw_track,
        RendererConfig(),
        0,
        scene,
        error=RuntimeError,
    )


SIDE = 48
LENS = fisheye(SIDE, 140.0)


def radiance(seed=0, frames=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, frames, len(LENS.pixels), generator=generator) * 2


def record(seen, brand="A", exposure="fixed", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return expose(seen, LENS, SIDE, BRANDS[brand], exposure, generator)


def test_automatic_gain_brings_the_mean_luminance_to_its_target():
    seen = radiance() * torch.tensor([0.1, 1.0, 7.0]).view(1, 3, 1)
    gain = gains(seen, "agc")
    assert gain.max() / gain.min() > 50
    assert_close(mean_luminance(seen * gain.view(1, 3, 1)), torch.full((3,), 0.22))
    assert (gains(seen, "fixed") == 1).all()


def test_frames_are_dark_outside_the_aperture_only():
    frames, _ = record(torch.ones(3, 2, len(LENS.pixels)))
    inside = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    inside[LENS.pixels] = True
    assert (frames.dtype, frames.shape) == (torch.uint8, (2, 3, SIDE, SIDE))
    flat = frames.flatten(2)
    assert (flat[..., ~inside] == 0).all()
    assert (flat[..., inside] > 0).all()
    assert 0.7 < inside.float().mean() < 0.8


def test_tone_is_the_curve_of_the_specification():
    x = torch.tensor([0.0, 0.1, 0.35, 1.0, 100.0])
    assert_close(tone(x), (1.15 * x / (0.35 + x)).clamp(max=1) ** (1 / 1.4))
    assert tone(x)[-1] == 1


def test_the_lens_dims_toward_its_edge():
    assert_close(vignetting(LENS), torch.cos(0.6 * LENS.angle) ** 2)
    edge = LENS.angle.argmax()
    frames, _ = record(torch.ones(3, 1, len(LENS.pixels)))
    assert frames[0, 0, SIDE // 2, SIDE // 2] > frames.flatten(2)[0, 0, LENS.pixels[edge]] + 10


def test_motion_blur_spreads_a_point_by_at_most_a_pixel_and_keeps_its_light():
    seen = torch.zeros(3, 8, len(LENS.pixels))
    seen[:, :, int(LENS.angle.argmin())] = 1e-3  # too weak for the knee of the tone curve
    blurred = torch.stack(_blur(list(seen), LENS, SIDE, torch.Generator().manual_seed(3)))
    assert_close(blurred.sum(2), seen.sum(2))
    assert (blurred > 0).sum(2).max() <= 9
    assert ((blurred > 0).sum(2) > 1).any()


@pytest.mark.parametrize("level", [0.02, 1.0])
def test_noise_grows_with_light_and_repeats_with_its_seed(level):
    seen = torch.full((3, 1, len(LENS.pixels)), level)
    first, again, other = (record(seen, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    center = first[0, :, SIDE // 2 - 8 : SIDE // 2 + 8, SIDE // 2 - 8 : SIDE // 2 + 8].float()
    assert 0.5 < center.std() < 12
