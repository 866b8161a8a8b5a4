import albumentations as A
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endoscopy.data.images import Frame, Pipeline, resize_frame, resizing, train_pipeline

SIZE = 64


def frame(size=SIZE, box=(18, 15, 42, 39)):
    """A frame whose red channel, mask and depth mark the box."""
    xmin, ymin, xmax, ymax = box
    mask = np.zeros((size, size), np.uint8)
    mask[ymin:ymax, xmin:xmax] = 1
    y, x = np.mgrid[:size, :size]
    image = np.stack([200 * mask + 20, 3 * x, 2 * y], -1).astype(np.uint8)
    return Frame(image, tuple(map(float, box)), mask, np.where(mask > 0, 5.0, 12.5).astype("f4"))


def bounds(mask):
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize("recipe", ["published", "dihedral", "cifar"])
def test_targets_move_together(recipe):
    pipeline = train_pipeline(SIZE, recipe)
    moved = 0
    for key in range(20):
        result = pipeline(frame(), key)
        red = result.image[..., 0] * (255 if result.image.dtype == np.float32 else 1)
        inside, outside = red[result.mask == 1], red[result.mask == 0]
        assert np.median(inside) > 120
        assert np.median(outside) < 60
        assert set(np.unique(result.depth)) <= {np.float32(v) for v in (0.0, 5.0, 12.5)}
        assert ((result.depth == 5.0) == (result.mask == 1)).all()
        found, box = np.array(bounds(result.mask)), np.array(result.box)
        tolerance = 6 if recipe == "published" else 0  # corners of a square leave its ellipse
        assert np.abs(found - box).max() <= tolerance
        moved += not np.allclose(result.box, frame().box, atol=0.5)
    assert moved > 4


def test_rotation_does_not_grow_the_box():
    """A round polyp keeps its box; the box around a turned box would grow by up to 1.37."""
    pipeline = train_pipeline(SIZE, "published")
    sides = []
    for key in range(40):
        xmin, ymin, xmax, ymax = pipeline(frame(), key).box
        sides += [xmax - xmin, ymax - ymin]
    np.testing.assert_allclose(sides, 24.0, atol=0.3)


def test_the_dihedral_recipe_is_exact_and_reaches_all_eight():
    pipeline = train_pipeline(SIZE, "dihedral")
    start = frame()
    images = [start.image, start.image.transpose(1, 0, 2)]
    images = [np.rot90(image, k) for image in images for k in range(4)]
    seen = set()
    for key in range(80):
        result = pipeline(start, key)
        matches = [k for k, image in enumerate(images) if np.array_equal(image, result.image)]
        assert len(matches) == 1
        seen.add(matches[0])
        np.testing.assert_allclose(result.box, bounds(result.mask), atol=1e-3)
    assert len(seen) == 8


def test_color_recipe_has_its_limits():
    """Brightness and contrast stay near 15 %, and the noise has its standard deviation."""
    gray = Frame(np.full((256, 256, 3), 128, np.uint8), (64.0, 64.0, 192.0, 192.0))
    pipeline = train_pipeline(256, "published")
    levels = []
    for key in range(30):
        image = pipeline(gray, key).image
        assert image.dtype == np.float32
        assert 0 <= image.min() <= image.max() <= 1
        center = image[96:160, 96:160]
        levels.append(center.mean())
        assert center.std(axis=(0, 1)) == pytest.approx([0.01] * 3, rel=0.12)
    assert 0.502 * 0.85**2 - 0.01 < min(levels) < 0.47
    assert 0.53 < max(levels) < 0.502 * 1.15**2 + 0.01


@settings(max_examples=15)
@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from([16, 48, 64]))
def test_resizing_is_the_first_step_of_every_pipeline(height, width, size):
    rng = np.random.default_rng(height * 100 + width)
    start = Frame(
        rng.integers(0, 256, (height, width, 3), np.uint8),
        (2.0, 3.0, 12.0, 17.0),
        rng.integers(0, 2, (height, width), np.uint8),
        rng.random((height, width), np.float32),
    )
    direct, piped = resize_frame(start, size), Pipeline([resizing(size)])(start)
    np.testing.assert_array_equal(direct.image, piped.image)
    np.testing.assert_array_equal(direct.mask, piped.mask)
    np.testing.assert_array_equal(direct.depth, piped.depth)
    expected = np.array([2 / width, 3 / height, 12 / width, 17 / height]) * size
    np.testing.assert_allclose(direct.box, expected)
    np.testing.assert_allclose(piped.box, expected, atol=1e-4)


def test_shrinking_averages():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    small = resize_frame(Frame(pixels, (0.0, 0.0, 1.0, 1.0)), 32).image
    assert np.abs(small - pixels.reshape(32, 2, 32, 3, 3).mean((1, 3))).max() <= 1


def test_a_polyp_that_leaves_the_frame_has_no_box():
    pipeline = Pipeline([A.Affine(translate_px={"x": 60, "y": 0}, scale=1.0, shear=0.0, p=1.0)])
    assert pipeline(frame()).box == (0.0, 0.0, 0.0, 0.0)


CHANGES_SCALE = [
    A.RandomScale(),
    A.Affine(scale=(0.9, 1.1)),
    A.Affine(scale=1.0, shear=(-5, 5)),
    A.RandomResizedCrop((SIZE, SIZE)),
    A.RandomCrop(8, 8),
    A.SafeRotate(),
    A.Perspective(),
    A.ElasticTransform(),
    A.GridDistortion(),
    A.LongestMaxSize([32, 64]),
    A.CropAndPad(percent=0.1),
    A.RandomSizedBBoxSafeCrop(SIZE, SIZE),
]


@pytest.mark.parametrize("step", CHANGES_SCALE, ids=lambda step: type(step).__name__)
def test_scale_changes_are_refused_at_any_depth(step, refused):
    words = f"{type(step).__name__} may change the scale"
    for steps in ([step], [A.OneOf([A.NoOp(), A.Sequential([step])])]):
        refused(words, Pipeline, steps, error=ValueError)
    Pipeline([step], scale_changes="allow")


def test_isometries_and_colors_are_allowed():
    steps = [
        A.Resize(8, 8),
        A.Affine(rotate=(-9, 9), translate_px=3, scale=1.0, shear=0.0),
        A.OneOf([A.GaussianBlur(), A.CLAHE(), A.ToGray()]),
        A.Transpose(),
    ]
    assert Pipeline(steps)(frame(), 1).image.shape == (8, 8, 3)


def test_wrong_names_are_refused(refused):
    refused("recipe 'strong' is unknown: choose one of published", train_pipeline, SIZE, "strong")
    refused(
        "scale_changes must be refuse or allow",
        Pipeline,
        [],
        scale_changes="maybe",
        error=ValueError,
    )
