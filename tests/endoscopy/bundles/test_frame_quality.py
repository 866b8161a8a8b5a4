"""Every reason to abstain is given for the fault that it names, and not for training frames."""

import json
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from endoscopy.bundles.frame_quality import (
    BLURRED,
    CLIPPED_EXPOSURE,
    CLIPPED_FRAME,
    OUT_OF_DISTRIBUTION,
    TOO_NEAR,
    TOO_SMALL,
    QualityLimits,
    fit_quality,
    frame_statistics,
)
from endoscopy.renderer.render import render_object
from endoscopy.renderer.scene import RendererConfig

SIZE = 48


def scenes(count, seed=0):
    """Textured reddish walls with a brighter lesion of 8 to 20 pixels away from the edge."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    images, boxes = [], []
    for _ in range(count):
        color = np.array([150, 80, 60]) * generator.uniform(0.8, 1.2, 3)
        texture = ndimage.gaussian_filter(generator.normal(0, 12, (SIZE, SIZE)), 0.7)
        width, height = generator.uniform(8, 20, 2)
        left, top = generator.uniform(4, 24, 2)
        lesion = ((2 * x - 2 * left - width) / width) ** 2 + (
            (2 * y - 2 * top - height) / height
        ) ** 2 < 1
        images.append((color * (1 + 0.25 * lesion + texture / 60)[..., None]).clip(0, 245))
        boxes.append((left, top, left + width, top + height))
    return np.stack(images).astype(np.uint8), np.array(boxes)


@pytest.fixture(scope="module")
def limits():
    return fit_quality(*scenes(400))


def reasons(limits, images, boxes):
    return limits.reasons(frame_statistics(images, boxes))


def share(limits, images, boxes, reason):
    return np.mean([reason in found.split("; ") for found in reasons(limits, images, boxes)])


def test_each_fault_has_its_reason(limits):
    images, boxes = scenes(60, seed=2)
    blurred = ndimage.gaussian_filter(images.astype(float), (0, 2.5, 2.5, 0)).astype(np.uint8)
    dark = (images * 0.03).astype(np.uint8)
    bright = (images * 6.0).clip(0, 255).astype(np.uint8)
    near = np.tile([2.0, 2.0, 46.0, 46.0], (60, 1))
    small = boxes.copy()
    small[:, 2:] = boxes[:, :2] + 2.5
    edge = boxes - np.tile(boxes[:, :1], (1, 4)) * [1, 0, 1, 0]
    faults = {
        BLURRED: (blurred, boxes),
        CLIPPED_EXPOSURE: (dark, boxes),
        TOO_NEAR: (images, near),
        TOO_SMALL: (images, small),
        CLIPPED_FRAME: (images, edge),
        OUT_OF_DISTRIBUTION: (images[..., ::-1], boxes),
    }
    for reason, case in faults.items():
        assert share(limits, *case, reason) > 0.9, reason
        assert share(limits, images, boxes, reason) < 0.1, reason
    assert share(limits, bright, boxes, CLIPPED_EXPOSURE) > 0.9


def test_the_coding_of_the_file_is_no_reason():
    """Frames with a black border, in JPEG in training: the same as PNG are not another world."""
    images, boxes = (np.concatenate(parts) for parts in zip(*map(rendered, range(60)), strict=True))
    limits = fit_quality(np.stack([coded(image) for image in images]), boxes)
    assert share(limits, images, boxes, OUT_OF_DISTRIBUTION) < 0.05
    assert share(limits, images[..., ::-1], boxes, OUT_OF_DISTRIBUTION) > 0.9


def rendered(index):
    seen = render_object(RendererConfig(frames=6, depth="none"), index)
    return seen.images.permute(0, 2, 3, 1).numpy(), np.asarray(seen.boxes)


def coded(image):
    file = BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=95, subsampling=0)
    return np.asarray(Image.open(file))


def test_the_rate_is_that_of_the_training_frames():
    images, boxes = scenes(400)
    limits = fit_quality(images, boxes, rate=0.05)
    for reason in (OUT_OF_DISTRIBUTION, BLURRED, TOO_NEAR, TOO_SMALL):
        assert share(limits, images, boxes, reason) == pytest.approx(0.05, abs=0.006)


def test_limits_survive_json(limits):
    again = QualityLimits.from_state(json.loads(json.dumps(limits.state())))
    case = scenes(100, seed=3)
    assert reasons(again, *case) == reasons(limits, *case)
    distances = limits.distances(limits.mean + 2 * np.eye(len(limits.mean)))
    np.testing.assert_allclose(distances, 2 * np.sqrt(limits.precision.diagonal()))


@settings(max_examples=25)
@given(st.lists(st.floats(0, SIZE), min_size=4, max_size=4), st.integers(0, 1000))
def test_any_box_and_frame_can_be_judged(limits, corners, seed):
    low, high = np.minimum(corners[:2], corners[2:]), np.maximum(corners[:2], corners[2:])
    image = np.random.default_rng(seed).integers(0, 256, (1, SIZE, SIZE, 3)).astype(np.uint8)
    found = frame_statistics(image, np.array([[*low, *high]]))
    assert all(np.isfinite(values).all() for values in found.values())
    assert 0 <= found["cut"][0] <= 1
    assert isinstance(limits.reasons(found)[0], str)


def test_too_few_frames_are_refused(refused):
    refused("frames are too few", fit_quality, *scenes(10), error=ValueError)
