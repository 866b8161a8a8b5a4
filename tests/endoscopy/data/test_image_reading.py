import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from core_gates.errors import GatesError
from endoscopy.data.images import probe, read_depth, read_mask, read_rgb


def pixels(channels=3, dtype=np.uint8):
    top = np.iinfo(dtype).max
    shape = (24, 32, channels) if channels > 1 else (24, 32)
    return np.random.default_rng(0).integers(0, top, shape, dtype, endpoint=True)


def png16_rgb(path, values):
    """Write a PNG of three channels of 16 bits, which Pillow cannot."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_sixteen_bits_are_scaled_not_wrapped(tmp_path):
    gray = pixels(1, np.uint16)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert probe(tmp_path / "gray.png") == (32, 24, 16)
    read = read_rgb(tmp_path / "gray.png")
    np.testing.assert_array_equal(read[..., 0], gray // 257)
    np.testing.assert_array_equal(read[..., 1], read[..., 2])

    color = pixels(3, np.uint16)
    png16_rgb(tmp_path / "color.png", color)
    assert probe(tmp_path / "color.png") == (32, 24, 16)
    assert np.abs(read_rgb(tmp_path / "color.png").astype(int) - color // 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode, tmp_path):
    image = Image.fromarray(pixels()).convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(read_rgb(path), np.asarray(image.convert("RGB")))
    assert probe(path)[:2] == (32, 24)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_image_is_never_decoded_in_part(kind, share, tmp_path, refused):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(pixels()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for read in (probe, read_rgb):
        refused(str(path), read, path)


def test_padding_after_the_end_is_no_damage(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels()).save(path)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert probe(path) == (32, 24, 8)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not an image at all", bytes(5000)])
def test_what_is_no_image_is_refused(content, tmp_path, refused):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (probe, read_rgb, read_mask, read_depth):
        refused("cannot be read", read, path)


def test_absent_files_and_folders_are_named(tmp_path, refuses):
    refuses(
        GatesError,
        ("No such file", lambda: probe(tmp_path / "a.jpg")),
        ("cannot be read", lambda: read_rgb(tmp_path)),
    )


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, refused):
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    for read in (probe, read_rgb):
        refused("pixels", read, path)


def test_masks_of_every_kind(tmp_path):
    truth = (pixels(1) > 127).astype(np.uint8)
    for name, stored in {
        "a.png": truth * 255,
        "b.png": truth,
        "c.png": truth.astype(np.uint16) * 65535,
        "d.png": np.where(truth, 130, 125).astype(np.uint8),
    }.items():
        Image.fromarray(stored).save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), truth, err_msg=name)
    Image.fromarray(truth * 255).convert("1").save(tmp_path / "e.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "e.png"), truth)
    Image.fromarray(truth * 0).save(tmp_path / "f.png")
    assert read_mask(tmp_path / "f.png").sum() == 0


def test_depth_is_in_millimeters(tmp_path, refused):
    stored = pixels(1, np.uint16)
    Image.fromarray(stored).save(tmp_path / "a.png")
    depth = read_depth(tmp_path / "a.png")
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth * 256, stored)
    Image.fromarray(pixels(1)).save(tmp_path / "b.png")
    refused("expected one channel of 16 bits", read_depth, tmp_path / "b.png")
