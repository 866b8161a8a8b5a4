import dataclasses

import pytest
import torch
from torch.testing import assert_close

from endoscopy.renderer import RendererConfig, render_objects
from endoscopy.renderer.lumen import FAR
from endoscopy.renderer.render import render_object
from endoscopy.renderer.scene import SHAPES

CONFIG = RendererConfig(seed=7, side=48, frames=3)


@pytest.fixture(scope="module")
def rendered():
    return render_objects(CONFIG, range(8))


def test_an_object_does_not_depend_on_its_company(rendered):
    part = render_objects(CONFIG, [5, 2])
    for mine, theirs in zip(part, rendered, strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs[[5, 2]])
    assert part.brand == ("A", "A")
    assert not torch.equal(rendered.images[0], rendered.images[1])


def test_threads_change_nothing():
    config = RendererConfig(seed=7, side=160, frames=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = render_object(config, 3)
        torch.set_num_threads(2)
        two = render_object(config, 3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.depths, two.depths)


def test_only_the_exposure_differs_between_exposures(rendered):
    agc = render_objects(dataclasses.replace(CONFIG, exposure="agc"), range(2))
    assert torch.equal(agc.depths, rendered.depths[:2])
    assert torch.equal(agc.masks, rendered.masks[:2])
    assert not torch.equal(agc.images, rendered.images[:2])
    assert (rendered.gains == 1).all()
    assert (agc.gains != 1).all()


def test_boxes_are_tight_around_masks(rendered):
    masks, boxes = rendered.masks.flatten(0, 1), rendered.boxes.flatten(0, 1)
    for mask, (xmin, ymin, xmax, ymax) in zip(masks, boxes.tolist(), strict=True):
        inside = mask[ymin:ymax, xmin:xmax]
        assert inside.sum() == mask.sum() > 0
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.any()


def test_depth_on_the_polyp_is_about_its_distance(rendered):
    for index in range(8):
        depth = rendered.depths[index][rendered.masks[index]]
        distance = rendered.distance_mm[index]
        scene = render_object(CONFIG, index).scene
        assert depth.min() > distance.min() - scene.apex - scene.size - 1
        assert depth.max() < distance.max() + scene.size + 1
    assert rendered.depths.max() <= FAR


def test_depth_modes(rendered):
    none, relative = (
        render_object(dataclasses.replace(CONFIG, depth=mode), 1) for mode in ("none", "relative")
    )
    assert (none.depths == 0).all()
    assert torch.equal(none.images, rendered.images[1])
    known = rendered.depths[1] > 0
    assert torch.equal(relative.depths > 0, known)
    assert (relative.depths - rendered.depths[1]).abs()[known].mean() > 0.5


def test_a_polyp_too_small_for_a_pixel_keeps_one():
    config = RendererConfig(seed=7, side=16, frames=2)
    masks = render_objects(config, range(30)).masks.sum((2, 3))
    assert masks.min() == 1
    assert masks.max() > 5


def test_shapes_and_sizes_are_reported(rendered):
    assert rendered.size_mm.shape == (8,)
    assert (rendered.size_minor_mm <= rendered.size_mm).all()
    assert rendered.shape.max() < len(SHAPES)
    assert_close(rendered.number, torch.arange(8))


def test_ticks_and_faults(refuses):
    seen = []
    render_objects(RendererConfig(side=16, frames=1), [4, 9], tick=seen.append)
    assert seen == [1, 2]
    refuses(
        ValueError,
        ("at least one object", lambda: render_objects(CONFIG, [])),
        ("index must not be negative, got -1", lambda: render_objects(CONFIG, [-1])),
    )
