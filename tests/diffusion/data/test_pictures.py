"""Pictures that tell how they were made, byte for byte the same from the same record."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from core_gates.errors import GatesError
from diffusion.data.pictures import parameters_of, save_picture

RECORD = {
    "prompt": "a red heart, Noto style",
    "negative_prompt": "blurred",
    "seed": 7,
    "steps": 20,
    "guidance": 3.5,
    "sampler": "Euler",
    "model": 'tiny, "new"',
    "adapters": [{"name": "noto", "strength": 0.8, "score": float("nan")}, {"name": "heart"}],
}


@pytest.fixture
def image():
    return torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))


def test_a_picture_and_its_record(image, tmp_path):
    path = save_picture(image, tmp_path / "new" / "a.png", RECORD)
    found = Image.open(path)
    assert found.size == (5, 6)
    assert found.text["parameters"] == (
        "a red heart, Noto style <lora:noto:0.8> <lora:heart:1>\n"
        "Negative prompt: blurred\n"
        "Steps: 20, Sampler: Euler, CFG scale: 3.5, Seed: 7, Size: 5x6,"
        ' Model: "tiny, \\"new\\"", Version: gatesuite'
    )
    levels = torch.from_numpy(np.array(found)).permute(2, 0, 1)
    assert torch.equal(levels, (image * 255).round().byte())
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["adapters"][0] == {"name": "noto", "strength": 0.8, "score": None}
    assert sidecar["size"] == "5x6"
    assert sorted(one.name for one in path.parent.iterdir()) == ["a.json", "a.png"]


def test_the_same_record_gives_the_same_bytes(image, tmp_path):
    one, other = (save_picture(image, tmp_path / name, RECORD) for name in ("a.png", "b.png"))
    assert one.read_bytes() == other.read_bytes()
    third = save_picture(image, tmp_path / "c.png", RECORD | {"seed": 8})
    assert third.read_bytes() != one.read_bytes()
    assert Image.open(third).tobytes() == Image.open(one).tobytes()


def test_text_of_any_language(tmp_path, image):
    path = save_picture(image, tmp_path / "a.png", {"prompt": "ein Käfer, 心\0"})
    assert Image.open(path).text["parameters"].startswith("ein Käfer, 心\n")
    assert "心" in path.with_suffix(".json").read_text(encoding="utf-8")


def test_only_what_is_known_is_written():
    assert parameters_of({"prompt": "x", "other": 3}) == "x\nVersion: gatesuite"


def test_faults_leave_nothing(image, tmp_path, one_line):
    for path, picture, record, words in (
        ("a.jpg", image, {}, "ends in .png"),
        ("a.png", image, {"x": object()}, "cannot be written"),
        ("a.png", image[:2], {}, "found (2, 6, 5)"),
    ):
        text = one_line(GatesError, save_picture, picture, tmp_path / path, record)
        assert words in text
    assert not list(tmp_path.iterdir())
