import os
import pickle

import numpy as np
import pytest

from endoscopy.data.frame_cache import FrameCache, FrameReader
from endoscopy.data.readers.real_colon import read_real_colon

SIZE = 32


@pytest.fixture
def colon(real_colon, tmp_path):
    root = real_colon.official(tmp_path / "colon", frames=30, targets=True)
    return read_real_colon(root)[0]


@pytest.fixture
def reader(colon):
    return FrameReader(colon, SIZE, masks=True, depths=True)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.depth, expected.depth)
    assert found.box == expected.box


def test_raw_frames_are_those_of_the_reader(reader, tmp_path):
    rows = range(0, len(reader.table), 3)
    cache = FrameCache(reader, rows, tmp_path / "cache")
    steps = []
    assert cache.build(lambda done, total: steps.append((done, total))).findings == {}
    assert steps == [(k + 1, len(cache)) for k in range(len(cache))]
    for row in rows:
        assert row in cache
        assert_same(cache.read(row), reader.read(row))
    assert 1 not in cache


def test_jpeg_keeps_masks_and_depths_exact_and_images_nearly(reader, tmp_path):
    cache = FrameCache(reader, range(40), tmp_path, "jpeg")
    cache.build()
    for row in (0, 7, 39):
        found, expected = cache.read(row), reader.read(row)
        assert_same(found._replace(image=expected.image), expected)
        error = found.image.astype(int) - expected.image
        assert np.abs(error).max() > 0
        assert np.sqrt((error**2).mean()) < 3


def test_lesions_of_one_frame_share_it_but_not_the_box(reader, tmp_path):
    frames = reader.table.frames
    rows = np.flatnonzero(frames["frame_path"] == frames["frame_path"][0])
    assert len(rows) == 2
    cache = FrameCache(reader, rows, tmp_path)
    assert len(cache) == 1
    cache.build()
    first, second = (cache.read(row) for row in rows)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.box != second.box


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_the_size_is_known_before(reader, tmp_path, form):
    cache = FrameCache(reader, range(60), tmp_path, form)
    planned = cache.planned_bytes()
    cache.build()
    found = sum(path.stat().st_size for path in cache.folder.iterdir())
    headers = 128 * len(list(cache.folder.glob("*.npy")))
    if form == "raw":
        assert planned == found - headers
        pixels = len(cache) * SIZE * SIZE
        assert planned == 3 * pixels + pixels // 8 + 2 * pixels + len(cache)
    else:
        assert planned == pytest.approx(found - headers, rel=0.1)


def test_the_key_follows_content_and_form(reader, colon, tmp_path):
    def folder(rows=range(10), size=SIZE, form="raw", masks=True):
        reader = FrameReader(colon, size, masks=masks, depths=True)
        return FrameCache(reader, rows, tmp_path, form).folder

    first = folder()
    assert folder() == folder(reversed(range(10))) == first
    others = {folder(range(11)), folder(size=16), folder(form="jpeg"), folder(masks=False)}
    assert len(others | {first}) == 5
    path = colon.path(3)
    os.utime(path, ns=(1, 1))
    touched = folder()
    assert touched != first
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(1, 1))
    assert folder() != touched


class KilledError(Exception):
    pass


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_a_killed_build_goes_on_where_it_stopped(reader, tmp_path, form, monkeypatch, refused):
    def kill(done, total):
        if done == 7:
            raise KilledError

    cache = FrameCache(reader, range(20), tmp_path / "cache", form)
    with pytest.raises(KilledError):
        cache.build(kill)
    assert not cache.is_complete()
    refused("is not built", cache.read, 0)
    if form == "jpeg":  # killed while it appended a frame
        with next((tmp_path / "cache").glob(".*/image.bin")).open("ab") as stream:
            stream.write(b"half a frame")

    again = FrameCache(reader, range(20), tmp_path / "cache", form)
    decoded = []
    read = FrameReader.read
    monkeypatch.setattr(
        FrameReader, "read", lambda self, row: decoded.append(row) or read(self, row)
    )
    monkeypatch.setattr(FrameCache, "_require_space", lambda self: None)
    again.build()
    assert len(decoded) == len(again) - 7
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [again.folder.name]
    whole = FrameCache(reader, range(20), tmp_path / "whole", form)
    whole.build()
    for path in whole.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert_same(again.read(11), whole.read(11))


def test_a_complete_cache_is_not_built_again(reader, tmp_path, monkeypatch):
    FrameCache(reader, range(10), tmp_path).build()
    monkeypatch.setattr(FrameReader, "read", lambda self, row: pytest.fail("decoded again"))
    cache = FrameCache(reader, range(10), tmp_path)
    assert cache.is_complete()
    cache.build()
    cache.read(3)


def test_an_unreadable_frame_is_reported_and_skipped(colon, tmp_path, damage, refused):
    path = colon.path(4)
    damage(path)
    cache = FrameCache(FrameReader(colon, SIZE), range(len(colon)), tmp_path)
    refused(f"1 of 87 files cannot be read, more than 1 %.*{path}", cache.build)
    assert list(tmp_path.glob("*frames-*")) == []


def test_few_unreadable_frames_are_reported_and_left_out(real_colon, tmp_path, refused):
    colon, _ = read_real_colon(real_colon.official(tmp_path / "colon", frames=50))
    path = colon.path(4)
    path.write_bytes(path.read_bytes()[:200])
    cache = FrameCache(FrameReader(colon, SIZE), range(len(colon)), tmp_path / "cache")
    for report in (cache.build(), cache.build()):
        assert report.unreadable == [str(path)]
        assert report.count("image cannot be decoded") == 2  # both lesions of the frame
    assert [colon.path(row) for row in cache.unreadable_rows()] == [path, path]
    refused("cannot be read; leave row 4 out", cache.read, 4)
    cache.read(6)


def test_a_disk_that_is_too_small_is_told_before(reader, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    cache = FrameCache(reader, range(10), tmp_path / "cache")
    refused(r"a cache of 5 frames needs .* GB.*use form jpeg", cache.build)
    refused(
        "form is 'png'; choose one of raw, jpeg",
        FrameCache,
        reader,
        range(10),
        tmp_path,
        "png",
        error=ValueError,
    )


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_an_open_cache_goes_to_another_process_without_its_pixels(reader, tmp_path, form):
    cache = FrameCache(reader, range(60), tmp_path, form)
    cache.build()
    before = cache.read(5)
    content = pickle.dumps(cache)
    assert len(content) < cache.planned_bytes() / 2
    assert_same(pickle.loads(content).read(5), before)


def test_a_mask_of_another_size_is_refused(real_colon, colon, refused):
    real_colon.write_image(colon.path(0, "mask_path"), np.zeros((10, 10), np.uint8))
    refused("has 10 x 10 pixels, its frame 64 x 48", FrameReader(colon, SIZE, masks=True).read, 0)
    FrameReader(colon, SIZE).read(0)
