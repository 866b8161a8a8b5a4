import json

import numpy as np
import pytest
import torch
from PIL import Image

from core_gates.errors import GatesError
from diffusion.data.pictures import captioned_images, read_image


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


def test_folders_without_images_or_captions_are_refused(tmp_path):
    with pytest.raises(GatesError, match="no folder"):
        captioned_images(tmp_path / "none")
    with pytest.raises(GatesError, match="no image"):
        captioned_images(tmp_path)
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
    assert found.shape == (3, 32, 32)
    assert found[:, 0, 0].tolist() == [1, 1, 1]
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
    with pytest.raises(GatesError, match="is not in UTF-8"):
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
