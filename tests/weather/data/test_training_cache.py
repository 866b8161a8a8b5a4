"""Training caches: the same numbers as the store, one frame ahead, and no half-written ones."""

import pickle
import threading

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from core_gates.errors import GatesError
from weather.data.axes import to_dataset, to_tensor
from weather.data.store import open_wb2
from weather.data.training_cache import (
    SHARD_BYTES,
    FrameCache,
    FrameLoader,
    Layout,
    contiguous_block,
    store_frames,
    write_cache,
)
from weather.grid import regular_grid
from weather.state import FENGWU, ChannelSpec, Normalizer

GRID = regular_grid(9, 16, poles=True)
CHANNELS = ChannelSpec(("2m_temperature",), ("geopotential", "temperature"), (500, 850))
TIMES = np.datetime64("2020-02-27", "s") + np.arange(11) * np.timedelta64(6, "h")


def fields(count=11):
    draw = torch.Generator().manual_seed(0)
    mean = torch.tensor([280.0, 54000.0, 14000.0, 250.0, 275.0])[:, None, None]
    return mean + 5 * torch.randn(count, 5, *GRID.shape, generator=draw)


def written(path, states=None, **changes):
    states = fields() if states is None else states
    layout = Layout(CHANNELS, GRID, TIMES, {"store": "x"})
    return write_cache(path, layout, states, statistics_of=range(6), **changes)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """In shards of four frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weather.data.training_cache.SHARD_BYTES", 4 * 4 * 5 * 9 * 16)
        return written(tmp_path_factory.mktemp("cache") / "truth.zarr")


def test_frames_come_back_bit_for_bit(path):
    cache, states = FrameCache(path), fields()
    assert len(list((path / "frames" / "c").iterdir())) == 3
    assert len(cache) == 11
    assert all(torch.equal(cache[number], states[number]) for number in (10, 0, 5, 7))
    assert (cache.channels, cache.grid) == (CHANNELS, GRID)
    assert (cache.times == TIMES).all()
    assert cache.identity == {"store": "x"}
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied[3], states[3])


def test_other_programs_read_it(path):
    with xr.open_zarr(path, consolidated=False, chunks=None) as seen:
        assert seen["frames"].dims == ("time", "channel", "latitude", "longitude")
        assert (seen["time"].values.astype("datetime64[s]") == TIMES).all()
        np.testing.assert_array_equal(seen["frames"].values, fields().numpy())
    array = zarr.open_array(path / "frames", mode="r")
    assert array.chunks == (1, 5, 9, 16)
    assert array.shards == (4, 5, 9, 16)


def test_statistics_in_the_attributes_are_those_in_memory(path):
    found = FrameCache(path).normalizer()
    expected = Normalizer.fit(fields()[:6].double(), area_weights=GRID.area_weights())
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-6, atol=0)


def test_frames_read_ahead_are_read_by_another_thread(path, monkeypatch):
    cache, threads = FrameCache(path), {}
    read = cache._shards.read
    monkeypatch.setattr(
        cache._shards, "read",
        lambda n: (threads.setdefault(n, threading.current_thread().name), read(n))[1],
    )  # fmt: skip
    cache.ahead([4, 9])
    assert torch.equal(cache[4], fields()[4])
    assert torch.equal(cache[2], fields()[2])
    assert threads[4].startswith("frames")
    assert threads[2] == threading.current_thread().name


def test_parts_cover_all_positions_once_and_in_order():
    for count, parts in ((11, 3), (2, 4), (12, 4)):
        blocks = [contiguous_block(count, parts, part) for part in range(parts)]
        assert [place for block in blocks for place in block] == list(range(count))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    with pytest.raises(ValueError, match="part 3 of 3"):
        contiguous_block(11, 3, 3)


def test_a_loader_gives_every_frame_or_some_in_order(path):
    cache, states = FrameCache(path), fields()
    some = FrameLoader(cache, range(1, 11))
    assert len(some) == 10
    for _ in range(2):
        assert torch.equal(torch.stack(list(some)), states[1:])
    assert torch.equal(torch.stack(list(FrameLoader(cache))), states)


def test_a_store_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("weather.data.training_cache.BLOCK_BYTES", 8 * 5 * 9 * 16 * 4)
    dataset = to_dataset(fields(), CHANNELS, GRID, times=TIMES)
    dataset = dataset.isel(time=[3, 0, 1, 2, *range(4, 11)])  # not in order
    dataset.to_netcdf(tmp_path / "store.nc", engine="h5netcdf")
    with open_wb2(tmp_path / "store.nc", CHANNELS) as opened:
        blocks = list(store_frames(opened, CHANNELS))
        assert [len(block) for block in blocks] == [4, 4, 3]
        assert torch.equal(torch.cat(blocks), to_tensor(opened, CHANNELS))
        assert torch.equal(torch.cat(blocks), fields())
        some = torch.cat(list(store_frames(opened, CHANNELS, [2, 9])))
        assert torch.equal(some, fields()[[2, 9]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[7, 2].fill_(float("nan")), r"z850 .* in 100 % .*2020-02-28T18.*half-wr"),
        (lambda x: x[7, 2, 3, 4].fill_(float("nan")), "z850 is missing .* 0.694 % .*: fill them"),
        (lambda x: x[7, 2].fill_(9.0), "z850 is 9 everywhere at 2020-02-28T18.*half-written"),
        (lambda x: x[9, 3].sub_(273.15), "2020-02-29T06: temperature ranges.*degrees Celsius"),
    ],
)
def test_every_frame_of_a_store_is_judged(change, words):
    states = fields()
    change(states)
    dataset = to_dataset(states, CHANNELS, GRID, times=TIMES)
    with pytest.raises(GatesError, match=words):
        list(store_frames(dataset, CHANNELS))


def test_a_cache_is_written_whole_or_not_at_all(tmp_path):
    for states, words in ((fields(10), "10 frames for 11"), (fields(12), "12 frames for 11")):
        with pytest.raises(GatesError, match=words):
            written(tmp_path / "truth.zarr", states)
        assert list(tmp_path.iterdir()) == []
    first = written(tmp_path / "truth.zarr")

    def failing():
        yield fields()[0]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        written(first, failing())
    assert torch.equal(FrameCache(first)[4], fields()[4])


def test_damaged_caches_are_named_with_the_remedy(tmp_path):
    with pytest.raises(GatesError, match=r"none.zarr is no training cache.*delete it"):
        FrameCache(tmp_path / "none.zarr")
    path = written(tmp_path / "truth.zarr")
    shard = path / "frames" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    nan = np.float32(np.nan).tobytes()
    shard.write_bytes(bytes(content[:8]) + nan + bytes(content[12:]))
    with pytest.raises(GatesError, match=r"2020-02-27T00:00 is damaged .*not finite.*delete"):
        FrameCache(path)[0]
    shard.write_bytes(content[-300:])
    with pytest.raises(GatesError, match=r"2020-02-29T12:00 is damaged"):
        FrameCache(path)[10]
    shard.unlink()
    with pytest.raises(GatesError, match=r"2020-02-27T06:00 is damaged"):
        FrameCache(path)[1]
    group = zarr.open_group(path, mode="a")
    group["frames"].attrs["channels"] = {"surface": [], "upper": [], "levels": []}
    with pytest.raises(GatesError, match="is no training cache"):
        FrameCache(path)


def test_a_shard_holds_some_frames_and_one_at_least():
    large = Layout(FENGWU, regular_grid(721, 1440, poles=True), TIMES, {})
    assert large.frame_bytes > SHARD_BYTES
    assert large.shard_frames == 1
    assert Layout(CHANNELS, GRID, TIMES, {}).shard_frames == 11
