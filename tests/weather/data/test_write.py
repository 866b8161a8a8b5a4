import json
import os

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from core_gates.errors import GatesError
from weather.data import writing
from weather.data.axes import to_dataset, to_tensor
from weather.data.store import open_wb2
from weather.data.writing import write_wb2
from weather.grid import regular_grid
from weather.state import ChannelSpec

CHANNELS = ChannelSpec(
    surface=("2m_temperature",), upper=("temperature", "u_component_of_wind"), levels=(850, 500)
)
GRID = regular_grid(6, 8, poles=False)
TIMES = np.datetime64("2020-02-28T18", "ns") + np.arange(3) * np.timedelta64(6, "h")
LEADS = np.array([0, 6, 12, 18], "timedelta64[h]")


def states(*leading, seed=0):
    """Temperatures near 280 K, winds near 10 m/s."""
    noise = torch.randn(*leading, 5, 6, 8, generator=torch.Generator().manual_seed(seed))
    return noise + torch.tensor([280.0, 280, 280, 10, 10])[:, None, None]


def analyses(seed=0):
    return to_dataset(states(3, seed=seed), CHANNELS, GRID, times=TIMES)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("members", [0, 2])
@pytest.mark.parametrize("forecast", [False, True])
def test_round_trip(zarr_format, members, forecast, tmp_path):
    leading = (3, *([4] if forecast else []), *([members] if members else []))
    x = states(*leading)
    dataset = to_dataset(x, CHANNELS, GRID, times=TIMES, leads=LEADS if forecast else None)
    path = write_wb2(dataset, tmp_path / "out.zarr", zarr_format=zarr_format)
    with open_wb2(path, CHANNELS, hours=6) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), x)
        np.testing.assert_array_equal(opened["time"], TIMES)
        np.testing.assert_array_equal(opened["latitude"], GRID.latitude)
        np.testing.assert_array_equal(opened["longitude"], GRID.longitude)
        assert opened["level"].values.tolist() == [850, 500]
        if forecast:
            np.testing.assert_array_equal(opened["prediction_timedelta"], LEADS)
        if members:
            assert opened["number"].values.tolist() == [0, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_schema_on_disk(zarr_format, tmp_path):
    dataset = to_dataset(states(3, 4), CHANNELS, GRID, times=TIMES, leads=LEADS)
    dataset = dataset.transpose("longitude", "latitude", ...).astype(np.float64)
    path = write_wb2(dataset, tmp_path / "out.zarr", zarr_format=zarr_format)
    group = zarr.open_consolidated(path, zarr_format=zarr_format)
    assert group["time"].dtype == np.int64
    assert group["time"].attrs["units"] == "seconds since 1970-01-01"
    assert group["time"][0] == 1_582_912_800
    assert group["prediction_timedelta"].dtype == np.int64
    assert group["prediction_timedelta"].attrs["units"] == "nanoseconds"
    assert group["prediction_timedelta"][1] == 6 * 3600 * 10**9
    assert group["level"].dtype == np.int64
    assert group["temperature"].dtype == np.float32
    assert group["temperature"].chunks == (1, 1, 2, 6, 8)
    assert group["2m_temperature"].chunks == (1, 1, 6, 8)
    assert group["temperature"].attrs["units"] == "K"
    assert group["u_component_of_wind"].attrs["units"] == "m s-1"
    with xr.open_zarr(path, chunks=None, decode_timedelta=True) as plain:
        assert plain["prediction_timedelta"].dtype == "timedelta64[ns]"
        assert plain["time"].dtype.kind == "M"
        assert plain["temperature"].dims == (
            "time",
            "prediction_timedelta",
            "level",
            "latitude",
            "longitude",
        )


def test_blocks_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_BYTES", 2 * analyses().nbytes // 3)
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    with open_wb2(path, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3))
        np.testing.assert_array_equal(opened["time"], TIMES)
    metadata = json.loads((path / ".zmetadata").read_text())["metadata"]
    assert metadata["temperature/.zarray"]["shape"][0] == 3


def test_lazy_datasets_are_written(tmp_path):
    first = write_wb2(analyses(), tmp_path / "first.zarr")
    with open_wb2(first) as opened:
        second = write_wb2(opened, tmp_path / "second.zarr", zarr_format=3)
    with open_wb2(second, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3))


def test_existing_store_is_refused_then_replaced(tmp_path):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    with pytest.raises(GatesError, match=r"out.zarr exists; choose another path or overwrite it"):
        write_wb2(analyses(1), path)
    write_wb2(analyses(1).isel(time=[0]), path, overwrite=True)
    with open_wb2(path, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3, seed=1)[:1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


def test_urls_are_refused(tmp_path):
    with pytest.raises(
        GatesError, match=r"gs://bucket/out\.zarr is a URL, expected a local folder"
    ):
        write_wb2(analyses(), "gs://bucket/out.zarr")


def test_failed_write_leaves_the_old_store(tmp_path, monkeypatch):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    monkeypatch.setattr(writing, "BLOCK_BYTES", 1)
    appended = writing._append

    def fail_at_second(block, *rest):
        if block["time"].values[0] != TIMES[0]:
            raise OSError("disk full")
        appended(block, *rest)

    monkeypatch.setattr(writing, "_append", fail_at_second)
    with pytest.raises(OSError, match="disk full"):
        write_wb2(analyses(1), path, overwrite=True)
    with open_wb2(path, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


def killed_write(other, path):
    """Write in a process that dies after its first block."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    appended = writing._append
    writing._append = lambda block, *rest: (appended(block, *rest), os._exit(9))
    try:
        write_wb2(open_wb2(other), path, overwrite=True)
    finally:
        os._exit(0)


def test_killed_write_leaves_the_old_store(tmp_path):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    other = write_wb2(analyses(1), tmp_path / "other.zarr")
    assert killed_write(other, path) == 9
    assert [*tmp_path.glob(".out.*.partial.zarr")]
    with open_wb2(path, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3))
    write_wb2(analyses(1), path, overwrite=True)
    with open_wb2(path, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3, seed=1))


def test_store_set_aside_by_a_killed_call_comes_back(tmp_path):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    path.rename(tmp_path / ".out.zarr.previous")
    with pytest.raises(GatesError, match="exists"):
        write_wb2(analyses(1), path)
    with open_wb2(path, CHANNELS) as opened:
        assert torch.equal(to_tensor(opened, CHANNELS), states(3))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda ds: ds.rename(latitude="lat"), "dimensions .*lat.*expected time.*rename or add"),
        (lambda ds: ds.isel(time=0), "expected time.*rename or add"),
        (lambda ds: ds.expand_dims(lead=[1, 2]), "dimensions .*lead.*rename or add"),
        (lambda ds: ds.isel(time=[]), "holds no fields"),
        (lambda ds: ds[[]], "holds no fields|rename or add"),
        (lambda ds: ds.assign(a=ds["temperature"][0]), "a lacks time, latitude or longitude; drop"),
    ],
)
def test_other_schemas_are_refused(spoil, words, tmp_path):
    with pytest.raises(GatesError, match=words):
        write_wb2(spoil(analyses()), tmp_path / "out.zarr")
    assert list(tmp_path.iterdir()) == []


def test_states_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 5, 6, 8\), expected \(time, prediction"):
        to_dataset(states(3), CHANNELS, GRID, times=TIMES, leads=LEADS)
    with pytest.raises(ValueError, match=r"expected \(time, \*\(5, 4, 8\)\)"):
        to_dataset(states(3), CHANNELS, regular_grid(4, 8, poles=False), times=TIMES)
