"""Drawings of OpenMoji and their styles."""

import shutil
from importlib.resources import files

import numpy as np
import pytest

from core_gates.errors import GatesError
from diffusion.data.drawings import STYLES, Drawings, drawn, ink, over

PACKAGED = files("diffusion.data") / "openmoji"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(str(PACKAGED), tmp_path / "drawings")
    return tmp_path / "drawings"


def test_the_emoji_of_the_standard_are_read_once_each():
    found = Drawings.load()
    assert len(found) == 1914
    assert len(set(found.hexcodes)) == len(set(found.captions)) == 1914
    assert found.whole.sum() == 1906
    grapes = found.captions.tolist().index("grapes")
    assert found.subgroups[grapes] == "food-fruit"
    for images in found.images.values():
        assert images.shape == (1914, 32, 32, 3)
        assert images[grapes].min() < 200
        assert images[grapes, 0, 0].min() > 230


def test_a_folder_of_the_same_files_has_the_same_digest(folder):
    assert Drawings.load(folder).digest == Drawings.load().digest


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "emoji32.npz").unlink(), "No such file"),
        (lambda f: (f / "captions.csv").unlink(), "No such file"),
        (lambda f: (f / "emoji32.npz").write_bytes(b"PK\3\4 no zip"), "BadZipFile"),
        (
            lambda f: (f / "emoji32.npz").write_bytes((f / "emoji32.npz").read_bytes()[:99_999]),
            "BadZipFile",
        ),
        (lambda f: (f / "captions.csv").write_text("hexcode\n1F600\n"), "not those of"),
        (
            lambda f: np.savez(f / "emoji32.npz", hexcode=np.array(["a"], dtype=object)),
            "holds no whole set",
        ),
    ],
)
def test_damaged_drawings_are_one_line(folder, spoil, words):
    spoil(folder)
    with pytest.raises(GatesError, match=words) as caught:
        Drawings.load(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def drawings():
    return Drawings.load()


@pytest.fixture(scope="module")
def rows(drawings):
    return np.flatnonzero(drawings.whole)[::97]


@pytest.mark.parametrize("name", STYLES)
def test_every_style_is_an_image_unlike_the_plain_one(drawings, rows, name):
    plain, styled = drawn(drawings, rows), drawn(drawings, rows, (name,))
    assert (styled.shape, styled.dtype) == ((len(rows), 32, 32, 3), np.float32)
    assert styled.min() >= 0
    assert styled.max() <= 1
    assert np.sqrt(np.square(styled - plain).mean()) > 0.03


def test_styles_differ_from_each_other(drawings, rows):
    flat = np.stack([drawn(drawings, rows, (name,)).ravel() for name in STYLES])
    gaps = np.sqrt(np.square(flat[:, None] - flat[None]).mean(-1))
    assert gaps[~np.eye(len(flat), dtype=bool)].min() > 0.05


def test_involutions_and_fixed_points(drawings, rows):
    plain = drawn(drawings, rows)
    for name in ("inverted", "swapped", "upside_down"):
        change = STYLES[name].change
        np.testing.assert_allclose(change(change(plain)), plain, atol=1e-6)
    grey = STYLES["grey"].change
    np.testing.assert_allclose(grey(grey(plain)), grey(plain), atol=1e-6)
    pixels = STYLES["pixelated"].change
    np.testing.assert_allclose(pixels(pixels(plain)), pixels(plain), atol=1e-6)


def test_two_styles_are_applied_in_order(drawings, rows):
    noto = drawings.images["noto"][rows].astype(np.float32) / 255
    np.testing.assert_allclose(drawn(drawings, rows, ("noto", "inverted")), 1 - noto, atol=1e-6)
    framed = drawn(drawings, rows, ("inverted", "framed"))
    assert np.allclose(framed[:, 0, 0], (0.8, 0.1, 0.1))


def test_only_the_first_style_may_be_drawn_by_another_hand(drawings, rows):
    with pytest.raises(ValueError, match="only the first"):
        drawn(drawings, rows, ("inverted", "noto"))


def test_white_shows_the_background():
    white, black = np.ones((1, 32, 32, 3), np.float32), np.zeros((1, 32, 32, 3), np.float32)
    assert ink(white).max() == 0
    assert ink(black).min() == 1
    background = np.full(3, 0.25, np.float32)
    assert np.allclose(over(white, background), 0.25)
    assert np.allclose(over(black, background), 0)
