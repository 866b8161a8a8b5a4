"""Statistics of channels, and climatologies, whatever fits into memory."""

import numpy as np
import pytest
import torch
import xarray as xr

from core_gates.errors import GatesError
from weather.data.climatology import (
    channel_statistics,
    daily_climatology,
    read_climatology,
    root_mean_square_difference,
    write_climatology,
)
from weather.grid import regular_grid
from weather.state import ChannelSpec, Normalizer

ROWS_10 = regular_grid(10, 12, poles=False)


def states(count, seed):
    draw = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 300.0, 3e-4])[:, None, None]
    shift = torch.tensor([0.0, 5e4, 0.01])[:, None, None]
    return shift + scale * torch.randn(count, 3, *ROWS_10.shape, generator=draw)


def test_moments_are_those_in_memory():
    frames, chosen = states(20, 0), [3, 4, 9, 17]
    found = channel_statistics(frames.numpy(), ROWS_10.area_weights(), chosen)
    expected = Normalizer.fit(frames[chosen].double(), area_weights=ROWS_10.area_weights())
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(found.sd, expected.std, rtol=1e-6)
    whole = channel_statistics(frames.numpy(), ROWS_10.area_weights())
    assert np.abs(whole.mean - found.mean).min() > 0


def test_root_mean_squares_are_those_in_memory():
    truth, background = states(20, 0), states(9, 1)
    pairs = np.array([3, 4, 9]), np.array([8, 0, 1])
    found = root_mean_square_difference(
        truth.numpy(), background.numpy(), ROWS_10.area_weights(), pairs
    )
    gap = truth[pairs[0]].double() - background[pairs[1]]
    expected = ROWS_10.area_mean(gap.square()).mean(0).sqrt()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nothing_has_no_statistics():
    with pytest.raises(ValueError, match="there is no frame"):
        channel_statistics(states(2, 0).numpy(), ROWS_10.area_weights(), [])


GRID = regular_grid(4, 8, poles=False)
CHANNELS = ChannelSpec(("2m_temperature",), ("geopotential",), (500, 850))
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
    return 250 + 20 * draw.random((len(times), 3, *GRID.shape), dtype=np.float32), times


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
    path = write_climatology(tmp_path / "climatology.zarr", states, CHANNELS, GRID, times, first)
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
        found = read_climatology(path, CHANNELS, np.datetime64(time))
        torch.testing.assert_close(found, picked)


def test_what_cannot_be_computed_or_read_is_refused(series, tmp_path):
    states, times = series
    with pytest.raises(ValueError, match="window_days is 60, expected an odd"):
        next(daily_climatology(states, times, window_days=60))
    with pytest.raises(ValueError, match="there is no frame"):
        next(daily_climatology(states, times, []))
    with pytest.raises(GatesError, match=r"no climatology of 2020-01-01T00:00.*delete it"):
        read_climatology(tmp_path / "none.zarr", CHANNELS, np.datetime64("2020-01-01"))
    path = write_climatology(
        tmp_path / "short.zarr", states, CHANNELS, GRID, times, range(9), window_days=3
    )
    with pytest.raises(GatesError, match=r"has no data of 2020-06-01T00:00.*window_days"):
        read_climatology(path, CHANNELS, np.datetime64("2020-06-01"))
