"""What is shipped, and made of a store: caches, statistics, climatologies."""

import pickle
import threading

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from core_gates.errors import GatesError
from weather.data.axes import to_dataset, to_tensor
from weather.data.climatology import (
    channel_statistics,
    daily_climatology,
    read_climatology,
    root_mean_square_difference,
    write_climatology,
)
from weather.data.shipped import ATTRIBUTION, coastline, land_mask, land_rings, load_era5_sample
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
from weather.grid import Grid, gaussian_grid, regular_grid
from weather.state import FENGWU, ChannelSpec, Normalizer


def test_layout():
    fields, grid, channels, times = load_era5_sample()
    assert (fields.shape, fields.dtype) == ((10, 4, 4, 61, 120), torch.float32)
    assert channels.labels == ("z850", "z500", "t850", "t500")
    assert grid.latitude[[0, 1, -1]].tolist() == [90, 87, -90]
    assert grid.longitude[[0, 1, -1]].tolist() == [0, 3, 357]
    expected = np.array(["2017-01-01T00", "2017-01-01T12", "2017-01-02T00", "2017-01-02T12"])
    np.testing.assert_array_equal(times, expected.astype("datetime64[ns]"))
    assert "Copernicus" in ATTRIBUTION


def test_fields_stand_the_right_way_up():
    """In January the Arctic is colder at 850 hPa than the Antarctic, Siberia than the Pacific."""
    fields, grid, channels, _ = load_era5_sample()
    t850 = fields[:, :, channels.index("temperature", 850)].mean((0, 1))
    north, south = grid.latitude > 60, grid.latitude < -60
    assert t850[north].mean() < t850[south].mean()
    row = int((grid.latitude - 60).abs().argmin())
    assert t850[row, grid.longitude == 120] < t850[row, grid.longitude == 180] - 5


LAND = {
    "Paris": (48.9, 2.4),
    "Moscow": (55.8, 37.6),
    "Brasilia": (-15.8, -47.9),
    "Alice Springs": (-23.7, 133.9),
    "Denver": (39.7, -105.0),
    "Nairobi": (-1.3, 36.8),
    "South Pole": (-90.0, 0.0),
    "Greenland": (72.0, -40.0),
    "Chukotka, east of 180": (66.5, -178.0),
    "Chukotka, west of 180": (67.0, 178.0),
    "border of Spain and Portugal": (39.0, -7.2),
}
SEA = {
    "North Pole": (90.0, 0.0),
    "Null Island": (0.0, 0.0),
    "Pacific": (0.0, -150.0),
    "Pacific at 180": (0.0, 180.0),
    "Gulf of Mexico": (25.0, -90.0),
    "Mediterranean": (35.0, 18.0),
    "Caspian": (42.0, 51.0),
    "Hudson Bay": (60.0, -86.0),
    "Tasman Sea": (-38.0, 160.0),
}


@pytest.mark.parametrize("place", {**LAND, **SEA})
@pytest.mark.parametrize("convention", [0, 360])
def test_places(place, convention):
    latitude, longitude = {**LAND, **SEA}[place]
    longitude = longitude % 360 if convention else longitude
    grid = Grid(torch.tensor([latitude]), torch.tensor([longitude]))
    assert land_mask(grid).item() == (place in LAND)


def test_mask_does_not_depend_on_the_orientation():
    grid = gaussian_grid(32, 64)
    mask = land_mask(grid)
    assert (mask.shape, mask.dtype) == ((32, 64), torch.bool)
    flipped = Grid(grid.latitude.flip(0), grid.longitude - 180)
    assert torch.equal(land_mask(flipped), mask.flip(0).roll(32, 1))


def test_changing_the_result_does_not_change_the_cache():
    grid = gaussian_grid(8, 16)
    first = land_mask(grid)
    kept = first.clone()
    first.zero_()
    assert torch.equal(land_mask(grid), kept)
    assert kept.any()


def test_polylines_never_jump():
    """No line crosses the map from one side to the other or follows its edges."""
    polylines = coastline()
    assert len(polylines) > 100
    for longitude, latitude in polylines:
        assert len(longitude) == len(latitude) >= 2
        assert np.abs(np.diff(longitude)).max() < 12
        assert np.abs(np.diff(latitude)).max() < 12
        edge = np.abs(longitude) >= 179.98
        assert not (edge[1:] & edge[:-1]).any()
    kept = sum(len(longitude) - 1 for longitude, _ in polylines)
    assert sum(len(ring) - 1 for ring in land_rings()) - kept < 25


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
    assert (len(list((path / "frames" / "c").iterdir())), len(cache)) == (3, 11)
    assert all(torch.equal(cache[number], states[number]) for number in (10, 0, 5, 7))
    assert (cache.channels, cache.grid) == (CHANNELS, GRID)
    assert (cache.times == TIMES).all()
    assert cache.identity == {"store": "x"}
    assert torch.equal(pickle.loads(pickle.dumps(cache))[3], states[3])


def test_other_programs_read_it(path):
    with xr.open_zarr(path, consolidated=False, chunks=None) as seen:
        assert seen["frames"].dims == ("time", "channel", "latitude", "longitude")
        assert (seen["time"].values.astype("datetime64[s]") == TIMES).all()
        np.testing.assert_array_equal(seen["frames"].values, fields().numpy())
    array = zarr.open_array(path / "frames", mode="r")
    assert (array.chunks, array.shards) == ((1, 5, 9, 16), (4, 5, 9, 16))


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


def test_parts_cover_all_positions_once_and_in_order(refused):
    for count, parts in ((11, 3), (2, 4), (12, 4)):
        blocks = [contiguous_block(count, parts, part) for part in range(parts)]
        assert [place for block in blocks for place in block] == list(range(count))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    refused("part 3 of 3", contiguous_block, 11, 3, 3, error=ValueError)


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
def test_every_frame_of_a_store_is_judged(change, words, refused):
    states = fields()
    change(states)
    dataset = to_dataset(states, CHANNELS, GRID, times=TIMES)
    refused(words, list, store_frames(dataset, CHANNELS))


def test_a_cache_is_written_whole_or_not_at_all(tmp_path, refused):
    for states, words in ((fields(10), "10 frames for 11"), (fields(12), "12 frames for 11")):
        refused(words, written, tmp_path / "truth.zarr", states)
        assert list(tmp_path.iterdir()) == []
    first = written(tmp_path / "truth.zarr")

    def failing():
        yield fields()[0]
        raise OSError("the disk is full")

    refused("full", written, first, failing(), error=OSError)
    assert torch.equal(FrameCache(first)[4], fields()[4])


def test_damaged_caches_are_named_with_the_remedy(tmp_path, refused):
    refused(r"none.zarr is no training cache.*delete it", FrameCache, tmp_path / "none.zarr")
    path = written(tmp_path / "truth.zarr")
    shard = path / "frames" / "c" / "0" / "0" / "0" / "0"
    content, nan = shard.read_bytes(), np.float32(np.nan).tobytes()
    for damaged, number, words in (
        (content[:8] + nan + content[12:], 0, "27T00:00 is damaged .*not finite.*delete"),
        (content[-300:], 10, "29T12:00 is damaged"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(GatesError, match=f"2020-02-{words}"):
            FrameCache(path)[number]
    shard.unlink()
    with pytest.raises(GatesError, match=r"2020-02-27T06:00 is damaged"):
        FrameCache(path)[1]
    group = zarr.open_group(path, mode="a")
    group["frames"].attrs["channels"] = {"surface": [], "upper": [], "levels": []}
    refused("is no training cache", FrameCache, path)


def test_a_shard_holds_some_frames_and_one_at_least():
    large = Layout(FENGWU, regular_grid(721, 1440, poles=True), TIMES, {})
    assert large.frame_bytes > SHARD_BYTES
    assert (large.shard_frames, Layout(CHANNELS, GRID, TIMES, {}).shard_frames) == (1, 11)


ROWS_10 = regular_grid(10, 12, poles=False)


def states(count, seed):
    draw = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 300.0, 3e-4])[:, None, None]
    shift = torch.tensor([0.0, 5e4, 0.01])[:, None, None]
    return shift + scale * torch.randn(count, 3, *ROWS_10.shape, generator=draw)


def test_root_mean_squares_are_those_in_memory():
    truth, background = states(20, 0), states(9, 1)
    pairs = np.array([3, 4, 9]), np.array([8, 0, 1])
    found = root_mean_square_difference(
        truth.numpy(), background.numpy(), ROWS_10.area_weights(), pairs
    )
    gap = truth[pairs[0]].double() - background[pairs[1]]
    np.testing.assert_allclose(found, ROWS_10.area_mean(gap.square()).mean(0).sqrt(), rtol=1e-6)


COARSE = regular_grid(4, 8, poles=False)
THREE = ChannelSpec(("2m_temperature",), ("geopotential",), (500, 850))
HOUR = np.timedelta64(1, "h")


def in_memory(states, times, window):
    """By its definition: (hours, 366, C, H, W) in float64."""
    days = times.astype("datetime64[D]")
    day = (days - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)
    hour = (times - days) // HOUR
    found = np.full((len(set(hour)), 366, *states.shape[1:]), np.nan)
    for index, one in enumerate(sorted(set(hour))):
        for target in range(366):
            gap = np.abs(day - target)
            gap = np.minimum(gap, 366 - gap)
            weight = np.clip(1 - gap / (window // 2 + 1), 0, None) * (hour == one)
            if weight.sum():
                found[index, target] = np.tensordot(weight, states, 1) / weight.sum()
    return found


@pytest.fixture(scope="module")
def series():
    """Two years, every twelve hours, with a gap in spring."""
    times = np.arange(np.datetime64("2019-01-01"), np.datetime64("2021-01-01"), 12 * HOUR)
    times = times[(times < np.datetime64("2019-03-01")) | (times > np.datetime64("2019-05-15"))]
    draw = np.random.default_rng(0)
    return 250 + 20 * draw.random((len(times), 3, *COARSE.shape), dtype=np.float32), times


@pytest.mark.parametrize("window", [1, 61])
def test_running_sums_are_the_weighted_mean(series, window):
    states, times = series
    chosen = np.arange(len(times))[100:900]
    expected = in_memory(states[chosen].astype(np.float64), times[chosen], window)
    found = np.full_like(expected, np.nan)
    for hour, day, mean in daily_climatology(states, times, chosen, window_days=window):
        found[(0, 12).index(hour), day] = mean
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.isnan(expected[0, 200]).any()


def test_days_far_from_all_data_are_left_out(series):
    states, times = series
    days = {day for _, day, _ in daily_climatology(states, times, range(20), window_days=7)}
    assert days == {*range(13), 363, 364, 365}


def test_the_store_has_the_layout_of_weatherbench(series, tmp_path):
    states, times = series
    first = range(150)
    path = write_climatology(tmp_path / "climatology.zarr", states, THREE, COARSE, times, first)
    expected = in_memory(states[first].astype(np.float64), times[first], 61)
    with xr.open_zarr(path, chunks=None, consolidated=True) as stored:
        assert dict(stored.sizes) == {
            "hour": 2, "dayofyear": 366, "latitude": 4, "longitude": 8, "level": 2,
        }  # fmt: skip
        assert stored["geopotential"].dims[:3] == ("hour", "dayofyear", "level")
        assert stored["dayofyear"].values.tolist() == list(range(1, 367))
        assert stored["geopotential"].dtype == np.float32
        np.testing.assert_allclose(stored["geopotential"].values, expected[:, :, 1:], rtol=1e-6)
    for time, day in (("2020-12-31T12:00", 365), ("2019-03-01T12:00", 59)):
        picked = torch.from_numpy(expected[1, day]).float()
        torch.testing.assert_close(read_climatology(path, THREE, np.datetime64(time)), picked)


def test_what_cannot_be_computed_or_read_is_refused(series, tmp_path, refuses, refused):
    states, times = series
    refuses(
        ValueError,
        (
            "window_days is 60, expected an odd",
            lambda: next(daily_climatology(states, times, window_days=60)),
        ),
        ("there is no frame", lambda: next(daily_climatology(states, times, []))),
        (
            "there is no frame",
            lambda: channel_statistics(fields(2).numpy(), GRID.area_weights(), []),
        ),
    )
    refused(
        r"no climatology of 2020-01-01T00:00.*delete it",
        read_climatology,
        tmp_path / "none.zarr",
        THREE,
        np.datetime64("2020-01-01"),
    )
    path = write_climatology(
        tmp_path / "short.zarr", states, THREE, COARSE, times, range(9), window_days=3
    )
    refused(
        r"has no data of 2020-06-01T00:00.*window_days",
        read_climatology,
        path,
        THREE,
        np.datetime64("2020-06-01"),
    )
