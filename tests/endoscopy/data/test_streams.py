import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from endoscopy.data.object_splits import make_folds
from endoscopy.data.streams import (
    ENDOSCOPY,
    STREAMS,
    aperture_mask,
    box_geometry,
    boxes_of,
    build_streams,
    crop_to_boxes,
    fill_boxes,
    normalize,
    relative_inverse,
)


@pytest.mark.parametrize("seed", [81, 82, 84])
def test_crops_are_those_of_the_reference(golden, seed):
    vectors = np.load(golden / f"gr_trainer_reference_s{seed}.npz", allow_pickle=False)
    images = torch.from_numpy(vectors["batch0.image"])
    boxes = torch.from_numpy(boxes_of(vectors["batch0.mask"][:, 0] > 0)).float()
    if "circ_mask" in vectors:
        circle = torch.from_numpy(vectors["circ_mask"])
        assert torch.equal(aperture_mask(*circle.shape)[0, 0], circle)
    aperture = 1.0 if "circ_mask" in vectors else None
    crop = build_streams(images, None, None, boxes, ["crop"], aperture=aperture)["crop"]
    torch.testing.assert_close(crop, torch.from_numpy(vectors["batch0.cropped"]), rtol=0, atol=1e-6)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 20, 24, generator=generator)
    boxes = torch.tensor([[4.0, 6.0, 12.0, 14.0], [0.0, 0.0, 0.0, 0.0]])
    masks = torch.zeros(2, 1, 20, 24)
    masks[0, 0, 7:12, 5:11] = 1
    depths = torch.rand(2, 1, 20, 24, generator=generator) * 20 + 5
    depths[:, :, :3] = 0
    return images, masks, depths, boxes


def test_streams_hold_what_they_say(batch):
    images, masks, depths, boxes = batch
    streams = build_streams(*batch, STREAMS)
    inside = torch.zeros(2, 1, 20, 24)
    inside[0, :, 6:14, 4:12] = 1
    shapes = {name: tuple(stream.shape) for name, stream in streams.items()}
    assert shapes == {name: (2, channels, 20, 24) for name, channels in STREAMS.items()}
    assert torch.equal(streams["rgb"], images)
    assert torch.equal(streams["loc"], images * inside)
    assert torch.equal(streams["rgb_mask"], torch.cat([images, masks], 1))
    assert torch.equal(streams["depth"], depths / 30)
    assert torch.equal(streams["rgb_mask_depth"], torch.cat([images, masks, depths / 30], 1))
    assert not streams["crop"][1].any()  # an empty box
    assert not streams["loc"][1].any()
    without = build_streams(images, None, depths, boxes, ["rgb_mask"])
    assert torch.equal(without["rgb_mask"][:, 3:], inside)


def test_relative_depth_keeps_order_and_loses_scale(batch):
    depths = batch[2]
    relative = relative_inverse(depths)
    known = depths > 0
    assert not relative[~known].any()
    assert relative.amin() == 0
    assert torch.equal(relative.amax((1, 2, 3)), torch.ones(2))
    expected = 1 / depths[0][known[0]]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(relative[0][known[0]], expected)
    torch.testing.assert_close(relative_inverse(3 * depths), relative)
    assert not relative_inverse(torch.full((1, 1, 4, 4), 7.0)).any()
    assert not relative_inverse(torch.zeros(1, 1, 4, 4)).any()


def test_the_aperture_blackens_images_only(batch):
    streams = build_streams(*batch, ["rgb", "rgb_mask_depth"], aperture=0.5)
    circle = aperture_mask(20, 24, 0.5)
    assert 0 < circle.sum() < 20 * 24
    assert torch.equal(streams["rgb"], batch[0] * circle)
    assert torch.equal(streams["rgb_mask_depth"][:, 3:4], batch[1])


coordinate = st.integers(0, 19)


@given(st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=4))
def test_boxes_and_masks_are_inverse(corners):
    boxes = torch.tensor(
        [[min(a, b), min(c, d), max(a, b) + 1, max(c, d) + 1] for a, b, c, d in corners]
    ).float()
    masks = fill_boxes(boxes, 20, 20)
    assert boxes_of(masks[:, 0].numpy() > 0).tolist() == boxes.tolist()
    assert torch.equal(masks.sum((1, 2, 3)), (boxes[:, 2:] - boxes[:, :2]).prod(1))


def test_a_box_fills_every_pixel_it_touches():
    mask = fill_boxes(torch.tensor([[2.3, 1.0, 4.1, 2.0], [5.0, 1.0, 5.0, 3.0]]), 6, 8)
    assert mask[0, 0].nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    assert not mask[1].any()
    assert not boxes_of(np.zeros((1, 4, 4), dtype=bool)).any()


def test_geometry_is_relative_to_the_frame():
    geometry = box_geometry(torch.tensor([[10.0, 20.0, 60.0, 40.0]]), 80, 200)
    expected = [math.log(0.25), math.log(0.25), 0.175, 0.375]
    assert geometry[0].tolist() == pytest.approx(expected)
    doubled = box_geometry(torch.tensor([[20.0, 40.0, 120.0, 80.0]]), 160, 400)
    torch.testing.assert_close(doubled, geometry)
    assert box_geometry(torch.zeros(1, 4), 80, 200).isfinite().all()


def test_normalization_has_the_published_constants():
    gray = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    mean, std = map(torch.tensor, ENDOSCOPY)
    found = normalize(gray)
    torch.testing.assert_close(found[0, :, 0, 0], (128 / 255 - mean) / std)
    torch.testing.assert_close(normalize(gray / 255), found)
    assert ENDOSCOPY == ((0.3224, 0.2263, 0.1750), (0.3178, 0.2406, 0.1933))


def test_unknown_streams_and_missing_depths_are_refused(batch, refused):
    images, masks, _, boxes = batch
    refused(
        "stream 'nbi' is unknown: choose from rgb, crop",
        build_streams,
        images,
        masks,
        None,
        boxes,
        ["rgb", "nbi"],
    )
    for name in ("depth", "relative_depth", "rgb_mask_depth"):
        refused(f"stream {name} needs depths", build_streams, images, masks, None, boxes, [name])


@pytest.mark.fault("faults 9")
@pytest.mark.parametrize(
    "box",
    [(30, 5, 40, 15), (-12, 5, -2, 15), (5, 24, 15, 30), (5, -9, 15, -1), (24, 0, 30, 5)],
)
def test_the_crop_of_a_box_outside_the_frame_is_empty(box):
    images = torch.rand(2, 3, 20, 24)
    boxes = torch.tensor([[4.0, 6.0, 12.0, 14.0], list(box)], dtype=torch.float32)
    crops = crop_to_boxes(images, boxes)
    assert torch.equal(crops[:1], crop_to_boxes(images[:1], boxes[:1]))
    assert not crops[1].any()


@pytest.mark.fault("faults 9")
def test_a_size_that_is_no_number_is_in_no_class(make_table, refused):
    refused(
        "sizes are NaN",
        make_folds,
        make_table({"a": 3.0, "b": 7.0, "c": math.nan}),
        2,
        level="object",
    )
