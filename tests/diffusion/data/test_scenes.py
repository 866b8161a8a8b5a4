"""The world that is drawn on demand: shapes, styles, captions and parts."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.data.scenes import (
    COLORS,
    SIZES,
    Scene,
    SceneDataModule,
    colors_of,
    drawn,
    images_of,
    scenes,
    spread,
)
from diffusion.data.shapes import SHAPES, distances, field
from diffusion.data.styles import (
    LUMINANCE,
    NEW_FILLS,
    NEW_STYLES,
    STYLES,
    WHOLE,
)

ANY = st.builds(
    lambda shape, pair, size, styles: Scene(shape, *pair, size, styles),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(colors_of("fish", "adapter")),
    st.sampled_from(sorted(SIZES)),
    st.one_of(
        st.tuples(st.sampled_from(sorted(STYLES))),
        st.tuples(st.sampled_from(sorted(NEW_FILLS)), st.sampled_from(sorted(WHOLE))),
    ),
)


def test_distances_of_a_disc_are_those_of_geometry():
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 31), np.linspace(-1.5, 1.5, 31))
    error = np.abs(distances("circle", x, y) - (np.hypot(x, y) - 0.95))
    assert error[np.hypot(x, y) > 0.2].max() < 0.005
    assert (np.diff(distances("square", np.array([1.0, 2.0, 4.0, 8.0]), np.zeros(4))) > 0.8).all()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_fits_and_is_filled(name):
    inside = field(name) < 0
    assert 0.07 < inside.mean() < 0.32
    assert not np.concatenate([inside[[0, -1]].ravel(), inside[:, [0, -1]].ravel()]).any()


def test_shapes_differ_from_each_other():
    masks = {name: field(name) < 0 for name in SHAPES}
    for a, b in itertools.combinations(SHAPES, 2):
        assert (masks[a] ^ masks[b]).sum() / (masks[a] | masks[b]).sum() > 0.12, (a, b)


@given(ANY)
def test_no_style_hides_the_shape(scene):
    image = drawn([scene])[0]
    other = next(s for s in ("circle", "umbrella") if s != scene.shape)
    assert np.abs(image - drawn([scene._replace(shape=other)])[0]).max() > 0.1


def test_every_style_changes_the_plain_drawing():
    for styles in zip(NEW_STYLES, strict=True):
        plain = Scene("fish", "red", "white")
        gap = np.abs(drawn([plain]) - drawn([plain._replace(styles=styles)]))
        assert np.sqrt((gap**2).mean()) > 0.03, styles


def test_a_drawing_does_not_depend_on_its_neighbors():
    found = spread(scenes("test", list(SHAPES), list(zip(STYLES, strict=True))), 40)
    for scene, image in zip(found, drawn(found), strict=True):
        assert np.allclose(drawn([scene])[0], image, atol=1e-6)


def test_the_second_style_is_put_on_the_first():
    scene = Scene("boat", "red", "white", "", ("dotted", "inverted"))
    first = drawn([scene._replace(styles=("dotted",))])
    assert np.allclose(drawn([scene]), 1 - first, atol=1e-6)


def test_a_drawing_is_moved_and_turned_by_the_seed_alone():
    found = scenes("test")[:8]
    assert torch.equal(images_of(found, 1), images_of(found, 1))
    assert not torch.equal(images_of(found, 1), images_of(found, 2))
    exact = torch.from_numpy(drawn(found)).permute(0, 3, 1, 2) * 2 - 1
    assert torch.equal(images_of(found, None), exact)


def test_parts_share_no_colors_and_miss_none():
    for shape in SHAPES:
        parts = [set(colors_of(shape, part)) for part in ("adapter", "gate", "test")]
        assert ([len(part) for part in parts], len(set().union(*parts))) == ([40, 6, 6], 52)
    assert len({tuple(colors_of(shape, "test")) for shape in SHAPES}) == len(SHAPES)


def test_colors_stand_out_from_their_grounds():
    for color, ground in colors_of("fish", "adapter"):
        gap = np.subtract(COLORS[color], COLORS[ground])
        assert np.linalg.norm(gap) > 0.55
        assert abs(gap @ LUMINANCE) > 0.1
        assert {color, ground} != {"white", "black"}


def test_captions_say_all_that_a_drawing_shows():
    scene = Scene("house", "orange", "black", "large", ("dotted", "sepia"))
    assert scene.caption() == "a large dotted sepia orange house on a black ground"
    assert scene.caption(1) == "on black, a large dotted sepia orange house"
    assert scene.caption(2) == "orange house on black, large, dotted, sepia"
    assert Scene("house", "orange", "black").caption() == "an orange house on a black ground"


def test_batches_are_functions_of_their_numbers():
    def make(rows, wordings, images):
        return rows, wordings, images

    one, two = (
        SceneDataModule(scenes("adapter"), make, steps=3, batch_size=4, seed=5) for _ in range(2)
    )
    for a, b in zip(list(one)[2], two[2], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one[0][2], one[1][2])
    assert len(list(one)) == len(one) == 3


def test_a_spread_is_of_the_whole_list():
    assert spread(range(100), 200) == list(range(100))
    found = spread(range(1000), 50)
    assert found == sorted(set(found))
    assert 400 < np.mean(found) < 600
