import shutil
from importlib.resources import files

import numpy as np
import pytest

from core_gates.errors import GatesError
from diffusion.data.drawings import Drawings

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
