"""Folders of captioned images, images with what made them, and contact sheets."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from core_gates.errors import GatesError
from diffusion.data.pictures import (
    GAP,
    captioned_images,
    contact_sheet,
    enlarged,
    parameters_of,
    read_image,
    save_picture,
)


def image(path, color="red", size=(48, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, color).save(path)
    return path


def test_images_of_kohya_folders_are_repeated(tmp_path):
    for name, caption in (("a", "a red\nfield"), ("b", "")):
        image(tmp_path / "10_fruit" / f"{name}.png").with_suffix(".txt").write_text(caption)
    image(tmp_path / "c.jpg.png").with_suffix(".txt").write_text("one")
    image(tmp_path / ".thumbnails" / "x.png")
    found = captioned_images(tmp_path)
    assert [(one.path.name, one.caption, one.repeats) for one in found] == [
        ("a.png", "a red field", 10), ("b.png", "", 10), ("c.jpg.png", "one", 1),
    ]  # fmt: skip


def test_a_table_names_images(tmp_path):
    image(tmp_path / "x" / "a.png")
    rows = [{"file_name": "x/a.png", "text": "field"}, {"file_name": "x/a.png", "prompt": "again"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*map(json.dumps, rows), ""]))
    assert [one.caption for one in captioned_images(tmp_path)] == ["field", "again"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", "line 1"),
        ('{"text": "a"}', "line 1"),
        ("[]", "line 1"),
        ('{"file_name": "../a.png", "text": "a"}', "not in the folder"),
        ('{"file_name": "b.png", "text": "a"}', "not in the folder"),
        ('{"file_name": "a.png"}', "no text"),
        ('{"file_name": "a.png", "text": 3}', "no text"),
        ('{"file_name": "a.png\\u0000", "text": "a"}', "not in the folder"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, line, words):
    image(tmp_path / "in" / "a.png")
    image(tmp_path / "a.png")
    (tmp_path / "in" / "metadata.jsonl").write_text(line)
    with pytest.raises(GatesError, match=words):
        captioned_images(tmp_path / "in")


def test_folders_without_images_or_captions_are_refused(tmp_path, refuses):
    refuses(
        GatesError,
        ("no folder", lambda: captioned_images(tmp_path / "none")),
        ("no image", lambda: captioned_images(tmp_path)),
    )
    image(tmp_path / "a.png")
    with pytest.raises(GatesError, match=r"has no caption: write one to a\.txt"):
        captioned_images(tmp_path)


def test_an_image_is_its_middle_square_on_white(tmp_path):
    path = tmp_path / "a.png"
    picture = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    picture.paste((255, 0, 0, 255), (16, 0, 48, 32))
    picture.putpixel((16, 0), (0, 0, 0, 0))
    picture.save(path)
    found = read_image(path, 32)
    assert (found.shape, found[:, 0, 0].tolist()) == ((3, 32, 32), [1, 1, 1])
    assert torch.equal(found[:, 1:, 1:].mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", b"GIF89a"])
def test_what_is_no_image_is_one_line(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(GatesError, match="cannot be read as an image"):
        read_image(path, 32)


def test_a_table_in_another_encoding_is_one_line(tmp_path):
    image(tmp_path / "a.png")
    line = '{"file_name": "a.png", "text": "caf\u00e9 \u2028 bar"}'
    (tmp_path / "metadata.jsonl").write_bytes(line.replace("\u2028", "").encode("latin-1"))
    with pytest.raises(GatesError, match=r"line 1: byte 36 is not UTF-8.* iconv -f LATIN1"):
        captioned_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    assert captioned_images(tmp_path)[0].caption == "caf\u00e9 \u2028 bar"


def test_a_day_is_no_number_of_repeats(tmp_path):
    image(tmp_path / "20240131_garden" / "a.png").with_suffix(".txt").write_text("one")
    with pytest.raises(GatesError, match="20240131 times in an epoch: give it another name"):
        captioned_images(tmp_path)


def test_images_that_are_not_read_are_named(tmp_path):
    image(tmp_path / "a.png").with_suffix(".txt").write_text("one")
    image(tmp_path / "b.gif").with_suffix(".txt").write_text("two")
    with pytest.raises(GatesError, match=r"b\.gif is not read"):
        captioned_images(tmp_path)


def test_the_levels_of_an_image_do_not_depend_on_its_bits(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "8.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    found = [read_image(tmp_path / name, 16) for name in ("8.png", "16.png")]
    assert torch.equal(*found)
    assert torch.equal(((found[0][0] + 1) * 127.5).round(), torch.arange(256.0).reshape(16, 16))
    Image.fromarray(levels.astype(np.float32) / 255).save(tmp_path / "f.tiff")
    with pytest.raises(GatesError, match="8 or 16 bits"):
        read_image(tmp_path / "f.tiff", 16)


def test_an_image_is_upright(tmp_path):
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 32, 16))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned right
    picture.save(tmp_path / "a.png", exif=turned)
    found = read_image(tmp_path / "a.png", 32)
    assert found[:, :, :16].eq(-1).all()
    assert found[:, :, 16:].eq(1).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    large = enlarged(Image.fromarray(pixels), 5)
    assert large.size == (6, 6)
    assert np.array_equal(np.asarray(large)[::3, ::3], pixels)
    assert enlarged(Image.new("RGB", (200, 300))).size == (200, 300)


def test_images_lie_in_rows():
    images = [Image.new("RGB", (128, 128), (10 * n, 0, 0)) for n in range(1, 6)]
    sheet = np.asarray(contact_sheet(images))
    assert sheet.shape == (2 * 128 + GAP, 3 * 128 + 2 * GAP, 3)
    step = 128 + GAP
    assert [int(sheet[row * step, column * step, 0]) for row in (0, 1) for column in (0, 1, 2)] == [
        10, 20, 30, 40, 50, 255,
    ]  # fmt: skip
    assert contact_sheet(images, columns=5).size == (5 * 128 + 4 * GAP, 128)
    with pytest.raises(ValueError, match="empty"):
        contact_sheet([])


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
def drawing():
    return torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))


def test_a_picture_and_its_record(drawing, tmp_path):
    path = save_picture(drawing, tmp_path / "new" / "a.png", RECORD)
    found = Image.open(path)
    assert found.size == (5, 6)
    assert found.text["parameters"] == (
        "a red heart, Noto style <lora:noto:0.8> <lora:heart:1>\n"
        "Negative prompt: blurred\n"
        "Steps: 20, Sampler: Euler, CFG scale: 3.5, Seed: 7, Size: 5x6,"
        ' Model: "tiny, \\"new\\"", Version: gatesuite'
    )
    levels = torch.from_numpy(np.array(found)).permute(2, 0, 1)
    assert torch.equal(levels, (drawing * 255).round().byte())
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["adapters"][0] == {"name": "noto", "strength": 0.8, "score": None}
    assert sidecar["size"] == "5x6"
    assert sorted(one.name for one in path.parent.iterdir()) == ["a.json", "a.png"]


def test_the_same_record_gives_the_same_bytes(drawing, tmp_path):
    one, other = (save_picture(drawing, tmp_path / name, RECORD) for name in ("a.png", "b.png"))
    assert one.read_bytes() == other.read_bytes()
    third = save_picture(drawing, tmp_path / "c.png", RECORD | {"seed": 8})
    assert third.read_bytes() != one.read_bytes()
    assert Image.open(third).tobytes() == Image.open(one).tobytes()


def test_text_of_any_language(tmp_path, drawing):
    path = save_picture(drawing, tmp_path / "a.png", {"prompt": "ein Käfer, 心\0"})
    assert Image.open(path).text["parameters"].startswith("ein Käfer, 心\n")
    assert "心" in path.with_suffix(".json").read_text(encoding="utf-8")


def test_only_what_is_known_is_written():
    assert parameters_of({"prompt": "x", "other": 3}) == "x\nVersion: gatesuite"


def test_faults_leave_nothing(drawing, tmp_path, one_line):
    for path, picture, record, words in (
        ("a.jpg", drawing, {}, "ends in .png"),
        ("a.png", drawing, {"x": object()}, "cannot be written"),
        ("a.png", drawing[:2], {}, "found (2, 6, 5)"),
    ):
        assert words in one_line(GatesError, save_picture, picture, tmp_path / path, record)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("46 S1")
@pytest.mark.parametrize(("encoding", "byte"), [("latin-1", 4), ("utf-16", 1), ("utf-16-le", 7)])
def test_a_caption_in_another_encoding_is_one_line(encoding, byte, tmp_path):
    caption = image(tmp_path / "a.png").with_suffix(".txt")
    caption.write_bytes("café\n".encode(encoding))
    other = "LATIN1" if encoding == "latin-1" else "UTF-16"
    said = f"a.txt, line 1: byte {byte} is not UTF-8: .* iconv -f {other} -t UTF-8"
    with pytest.raises(GatesError, match=said):
        captioned_images(tmp_path)
    caption.write_text("café\n", encoding="utf-8-sig")
    assert captioned_images(tmp_path)[0].caption == "café"
