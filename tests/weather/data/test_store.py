"""Stores in the schema of WeatherBench 2: read in every variant, and written."""

import json
import os
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from core_gates.errors import GatesError
from weather.data import writing
from weather.data.axes import dataset_grid, to_dataset, to_tensor
from weather.data.store import open_wb2, store_channels
from weather.data.writing import write_wb2
from weather.grid import regular_grid
from weather.state import ChannelSpec

CHANNELS = ChannelSpec(
    ("mean_sea_level_pressure", "2m_temperature"), ("temperature", "geopotential"), (850, 500)
)
GRID = regular_grid(4, 8, poles=False)


@pytest.fixture
def path(tmp_path):
    times = np.asarray(["2020-01-01", "2020-01-02"], dtype="datetime64[ns]")
    dataset = to_dataset(torch.ones(2, 6, *GRID.shape), CHANNELS, GRID, times=times)
    dataset["land_sea_mask"] = dataset["2m_temperature"].isel(time=0, drop=True)  # without time
    dataset["wind_chill"] = dataset["2m_temperature"]  # of an unknown unit
    dataset = dataset.rename(geopotential="z", latitude="lat")
    dataset.to_netcdf(tmp_path / "store.nc", engine="h5netcdf")
    return tmp_path / "store.nc"


def test_known_variables_with_a_time_and_all_levels_are_taken_or_those_chosen(path):
    surface, upper = ("2m_temperature", "mean_sea_level_pressure"), ("geopotential", "temperature")
    assert store_channels(path) == ChannelSpec(surface, upper, (500, 850))
    found = store_channels(path, ["temperature", "wind_chill"], [850])
    assert found == ChannelSpec(("wind_chill",), ("temperature",), (850,))
    assert store_channels(path, ["2m_temperature"], [850]) == ChannelSpec(("2m_temperature",))


spec = spec_from_file_location("make", Path(__file__).parents[2] / "data/weatherbench2/make.py")
make = module_from_spec(spec)
spec.loader.exec_module(make)

OFFICIAL, official_zarr, official_netcdf = make.CHANNELS, make.zarr, make.netcdf


def expected_fields(dataset):
    """The channels read by hand out of the official layout."""
    fields = [dataset[name].values for name in OFFICIAL.surface]
    for name in OFFICIAL.upper:
        fields += [dataset[name].values[:, make.LEVELS.index(level)] for level in OFFICIAL.levels]
    return torch.from_numpy(np.stack(fields, 1))


def west_first(dataset):
    shifted = dataset.assign_coords(longitude=(dataset.longitude + 180) % 360 - 180)
    return shifted.sortby("longitude")


def packed(dataset):
    """Encoding with 32-bit integers finer than float32, one of them the fill value."""
    encoding = {}
    for name, array in dataset.items():
        middle = float(array.mean().round())
        encoding[name] = {
            "dtype": "int32",
            "scale_factor": 2.0**-14,
            "add_offset": middle,
            "_FillValue": -(2**31) + 1,
        }
    return encoding


def to_memory(dataset, url, **options):
    dataset.to_zarr(fsspec.get_mapper(url), zarr_format=2, **options)
    return url


def memory_netcdf(dataset, folder):
    with fsspec.open("memory://accepted/store.nc", "wb") as file:
        file.write(official_netcdf(dataset, folder).read_bytes())
    return "memory://accepted/store.nc"


SHORT = {"geopotential": "z", "temperature": "t", "2m_temperature": "t2m"}
AXES = {"level": "pressure_level", "time": "valid_time", "latitude": "lat", "longitude": "lon"}

ACCEPTED = {
    "zarr 2": lambda ds, dir: official_zarr(ds, dir),
    "zarr 2, not consolidated": lambda ds, dir: official_zarr(ds, dir, consolidated=False),
    "zarr 3": lambda ds, dir: official_zarr(ds, dir, version=3, consolidated=False),
    "zarr as text": lambda ds, dir: str(official_zarr(ds, dir)),
    "zarr by file URL": lambda ds, dir: official_zarr(ds, dir).as_uri(),
    "zarr in memory": lambda ds, dir: to_memory(ds, "memory://accepted/store.zarr"),
    "netcdf 4": lambda ds, dir: official_netcdf(ds, dir),
    "netcdf 4 by URL": memory_netcdf,
    "netcdf 3": lambda ds, dir: official_netcdf(ds, dir, engine="scipy"),
    "netcdf packed and masked": lambda ds, dir: official_netcdf(ds, dir, encoding=packed(ds)),
    "open dataset": lambda ds, dir: ds,
    "longitude before latitude": lambda ds, dir: official_zarr(
        ds.transpose("time", "level", "longitude", "latitude"), dir
    ),
    "time last": lambda ds, dir: official_zarr(
        ds.transpose("level", "latitude", "longitude", "time"), dir
    ),
    "latitude ascending": lambda ds, dir: official_zarr(ds.sortby("latitude"), dir),
    "lat and lon": lambda ds, dir: official_zarr(ds.rename(latitude="lat", longitude="lon"), dir),
    "names of the climate data store": lambda ds, dir: official_netcdf(
        ds.rename(SHORT | AXES), dir
    ),
    "coordinate named apart from its dimension": lambda ds, dir: official_netcdf(
        ds.rename(latitude="lat").rename_vars(lat="latitude"), dir
    ),
    "longitude from -180": lambda ds, dir: official_zarr(west_first(ds), dir),
    "levels reversed": lambda ds, dir: official_zarr(ds.isel(level=[2, 1, 0]), dir),
    "levels shuffled": lambda ds, dir: official_zarr(ds.isel(level=[1, 2, 0]), dir),
    "levels as float": lambda ds, dir: official_zarr(
        ds.assign_coords(level=[500.0, 700.0, 850.0]), dir
    ),
    "times unsorted": lambda ds, dir: official_zarr(ds.isel(time=[2, 0, 3, 1]), dir),
    "times in seconds": lambda ds, dir: official_zarr(
        ds.assign_coords(time=ds.time.values.astype("datetime64[s]")), dir
    ),
    "float64": lambda ds, dir: official_zarr(ds.astype(np.float64), dir),
    "a dimension of size 1": lambda ds, dir: official_zarr(ds.expand_dims(expver=[1], axis=2), dir),
    "other variables": lambda ds, dir: official_zarr(
        ds.assign(orography=ds["2m_temperature"][0] * np.nan, name=((), "label")), dir
    ),
    "auxiliary coordinates": lambda ds, dir: official_zarr(
        ds.assign_coords(day=("time", np.arange(4)), step=0), dir
    ),
}


@pytest.mark.parametrize("variant", ACCEPTED)
def test_variants_are_one_dataset(variant, tmp_path):
    source = ACCEPTED[variant](make.official(), tmp_path)
    rtol = 2e-7 if "packed" in variant else 0  # unpacking rounds twice
    with open_wb2(source, OFFICIAL) as dataset:
        torch.testing.assert_close(
            to_tensor(dataset, OFFICIAL), expected_fields(make.official()), rtol=rtol, atol=0
        )
        for name in ("latitude", "longitude", "time"):
            np.testing.assert_array_equal(dataset[name], make.official()[name])
        assert (dataset["time"].dtype, dataset["level"].dtype) == ("datetime64[ns]", np.int64)
        assert dataset["level"].values.tolist() == [850, 500]
        assert dataset["temperature"].dims == ("time", "level", "latitude", "longitude")
        assert set(dataset.coords) == {"time", "level", "latitude", "longitude"}


def test_duplicate_times_keep_the_first_on_request(tmp_path):
    sound = make.official()
    path = official_zarr(xr.concat([sound, sound.isel(time=[1]) + 1], "time"), tmp_path)
    with open_wb2(path, OFFICIAL, drop_duplicate_times=True) as dataset:
        torch.testing.assert_close(to_tensor(dataset, OFFICIAL), expected_fields(sound))


def test_missing_values_on_request_are_reported(tmp_path, refused):
    sound = make.official()
    sound["geopotential"][1, ..., 3] = np.nan
    with open_wb2(official_zarr(sound, tmp_path), OFFICIAL, allow_missing=True) as dataset:
        assert dataset["geopotential"].attrs["missing_fraction"] == pytest.approx(1 / 3 / 16)
        assert dataset["temperature"].attrs["missing_fraction"] == 0
        refused(r"z850 is missing \(NaN\) in 1.56 % of the values", to_tensor, dataset, OFFICIAL)
        assert to_tensor(dataset, OFFICIAL, allow_missing=True).isnan().sum() == 2 * 8


def test_missing_value_outside_the_sample_is_found_when_read(tmp_path, refused):
    dataset = make.official(times=9)
    dataset["temperature"][1, 0, 0, 0] = np.nan
    with open_wb2(official_zarr(dataset, tmp_path), OFFICIAL) as opened:
        to_tensor(opened.isel(time=[0, 2]), OFFICIAL)
        refused("t500 is missing", to_tensor, opened, OFFICIAL)


def test_large_forecasts_are_sampled_at_their_ends(monkeypatch, refused):
    monkeypatch.setattr("weather.data.axes.BUDGET_BYTES", 5 * 16 * 8 * 4)
    leads = np.arange(5).astype("timedelta64[h]").astype("timedelta64[ns]")
    dataset = make.official().expand_dims(lead_time=leads, axis=1).copy(deep=True)
    dataset["temperature"][0, 2] = np.nan
    open_wb2(dataset, OFFICIAL)
    dataset["temperature"][0, 4, 0, 0, 0] = np.nan
    refused("temperature is missing", open_wb2, dataset, OFFICIAL)


def test_uneven_steps_are_accepted_unless_a_step_is_required(tmp_path, refused):
    path = official_zarr(make.official().isel(time=[0, 1, 3]), tmp_path)
    open_wb2(path, OFFICIAL).close()
    words = "1 of 2 time steps are not 6 h, the first is 12 h after 2017-01-01 06:00"
    refused(words, open_wb2, path, OFFICIAL, hours=6)
    open_wb2(official_zarr(make.official(), tmp_path, name="even.zarr"), OFFICIAL, hours=6).close()


def test_scalar_time_becomes_a_dimension(tmp_path):
    with open_wb2(official_netcdf(make.official().isel(time=2), tmp_path), OFFICIAL) as dataset:
        torch.testing.assert_close(
            to_tensor(dataset, OFFICIAL), expected_fields(make.official())[2:3]
        )


def test_forecast_ensembles_keep_their_dimensions(tmp_path):
    leads = np.array([0, 6, 12], "timedelta64[h]").astype("timedelta64[ns]")
    dataset = make.official().expand_dims(member=[0, 1], lead_time=leads)
    dataset = (dataset * (1 + 1e-3 * dataset.member)).drop_vars("member")
    with open_wb2(official_zarr(dataset, tmp_path), OFFICIAL) as opened:
        assert opened["number"].values.tolist() == [0, 1]
        assert opened["temperature"].dims[:4] == ("time", "prediction_timedelta", "number", "level")
        np.testing.assert_array_equal(opened["prediction_timedelta"], leads)
        fields = to_tensor(opened, OFFICIAL)
    assert fields.shape == (4, 3, 2, 6, 8, 16)
    base = expected_fields(make.official())
    torch.testing.assert_close(fields[:, 2, 0], base)
    torch.testing.assert_close(fields[:, 1, 1], base * 1.001)


def test_without_channels_everything_on_the_grid_is_kept(tmp_path, refused):
    dataset = make.official().isel(level=[2, 0, 1]).assign(label=("time", np.arange(4)))
    with open_wb2(official_zarr(dataset, tmp_path)) as opened:
        assert set(opened.data_vars) == {*make.SURFACE, *make.MEAN}
        assert opened["level"].values.tolist() == [500, 700, 850]
        assert dataset_grid(opened).shape == (8, 16)
    refused(
        "no variable on the grid; name a store with fields",
        open_wb2,
        xr.Dataset({"a": 1.0}, {"latitude": [1.0], "longitude": [1.0]}),
    )


def test_opening_does_not_change_a_given_dataset():
    dataset = make.official()
    copy = dataset.copy(deep=True)
    open_wb2(dataset, OFFICIAL)
    xr.testing.assert_identical(dataset, copy)


def test_only_what_is_needed_is_read(tmp_path):
    """A century of 0.25-degree fields (9 TB, all chunks absent and so the fill value) opens."""
    path = tmp_path / "huge.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3)
    shape, dims = (146_000, 13, 721, 1440), ["time", "level", "latitude", "longitude"]
    group.create_array(
        "temperature",
        shape=shape,
        chunks=(1, *shape[1:]),
        dtype="f4",
        fill_value=280.0,
        dimension_names=dims,
    )
    coordinates = (
        np.arange(shape[0]) * 6,
        np.arange(50, 700, 50),
        np.linspace(-90, 90, 721),
        np.arange(1440) / 4,
    )
    for name, values in zip(dims, coordinates, strict=True):
        group.create_array(name, data=values, dimension_names=[name])
    group["time"].attrs["units"] = "hours since 1920-01-01"
    channels = ChannelSpec(upper=("temperature",), levels=(500,))
    with open_wb2(path, channels) as dataset:
        assert dataset["temperature"].nbytes > 5e11
        assert not dataset["temperature"].variable._in_memory
        last = to_tensor(dataset.isel(time=[-1]), channels)
    assert last.shape == (1, 1, 721, 1440)
    assert (last == 280).all()
    shutil.rmtree(path)


FEW = ChannelSpec(
    surface=("2m_temperature",), upper=("temperature", "u_component_of_wind"), levels=(850, 500)
)
SMALL = regular_grid(6, 8, poles=False)
TIMES = np.datetime64("2020-02-28T18", "ns") + np.arange(3) * np.timedelta64(6, "h")
LEADS = np.array([0, 6, 12, 18], "timedelta64[h]")


def states(*leading, seed=0):
    """Temperatures near 280 K, winds near 10 m/s."""
    noise = torch.randn(*leading, 5, 6, 8, generator=torch.Generator().manual_seed(seed))
    return noise + torch.tensor([280.0, 280, 280, 10, 10])[:, None, None]


def analyses(seed=0):
    return to_dataset(states(3, seed=seed), FEW, SMALL, times=TIMES)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("members", [0, 2])
@pytest.mark.parametrize("forecast", [False, True])
def test_round_trip(zarr_format, members, forecast, tmp_path):
    x = states(*(3, *([4] if forecast else []), *([members] if members else [])))
    dataset = to_dataset(x, FEW, SMALL, times=TIMES, leads=LEADS if forecast else None)
    path = write_wb2(dataset, tmp_path / "out.zarr", zarr_format=zarr_format)
    with open_wb2(path, FEW, hours=6) as opened:
        assert torch.equal(to_tensor(opened, FEW), x)
        np.testing.assert_array_equal(opened["time"], TIMES)
        np.testing.assert_array_equal(opened["latitude"], SMALL.latitude)
        np.testing.assert_array_equal(opened["longitude"], SMALL.longitude)
        assert opened["level"].values.tolist() == [850, 500]
        if forecast:
            np.testing.assert_array_equal(opened["prediction_timedelta"], LEADS)
        if members:
            assert opened["number"].values.tolist() == [0, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_schema_on_disk(zarr_format, tmp_path):
    dataset = to_dataset(states(3, 4), FEW, SMALL, times=TIMES, leads=LEADS)
    dataset = dataset.transpose("longitude", "latitude", ...).astype(np.float64)
    path = write_wb2(dataset, tmp_path / "out.zarr", zarr_format=zarr_format)
    group = zarr.open_consolidated(path, zarr_format=zarr_format)
    time, lead = group["time"], group["prediction_timedelta"]
    assert (time.dtype, time.attrs["units"]) == (np.int64, "seconds since 1970-01-01")
    assert (lead.dtype, lead.attrs["units"]) == (np.int64, "nanoseconds")
    assert (time[0], lead[1]) == (1_582_912_800, 6 * 3600 * 10**9)
    assert (group["level"].dtype, group["temperature"].dtype) == (np.int64, np.float32)
    chunks = {name: group[name].chunks for name in ("temperature", "2m_temperature")}
    assert chunks == {"temperature": (1, 1, 2, 6, 8), "2m_temperature": (1, 1, 6, 8)}
    units = [group[name].attrs["units"] for name in ("temperature", "u_component_of_wind")]
    assert units == ["K", "m s-1"]
    with xr.open_zarr(path, chunks=None, decode_timedelta=True) as plain:
        assert plain["prediction_timedelta"].dtype == "timedelta64[ns]"
        dims = ("time", "prediction_timedelta", "level", "latitude", "longitude")
        assert plain["temperature"].dims == dims


def test_blocks_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_BYTES", 2 * analyses().nbytes // 3)
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    with open_wb2(path, FEW) as opened:
        assert torch.equal(to_tensor(opened, FEW), states(3))
        np.testing.assert_array_equal(opened["time"], TIMES)
    metadata = json.loads((path / ".zmetadata").read_text())["metadata"]
    assert metadata["temperature/.zarray"]["shape"][0] == 3


def test_existing_store_is_refused_then_replaced(tmp_path, refused):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    refused(r"out.zarr exists; choose another path or overwrite it", write_wb2, analyses(1), path)
    write_wb2(analyses(1).isel(time=[0]), path, overwrite=True)
    with open_wb2(path, FEW) as opened:
        assert torch.equal(to_tensor(opened, FEW), states(3, seed=1)[:1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


def test_failed_write_leaves_the_old_store(tmp_path, monkeypatch, refused):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    monkeypatch.setattr(writing, "BLOCK_BYTES", 1)
    appended = writing._append

    def fail_at_second(block, *rest):
        if block["time"].values[0] != TIMES[0]:
            raise OSError("disk full")
        appended(block, *rest)

    monkeypatch.setattr(writing, "_append", fail_at_second)
    refused("disk full", write_wb2, analyses(1), path, overwrite=True, error=OSError)
    with open_wb2(path, FEW) as opened:
        assert torch.equal(to_tensor(opened, FEW), states(3))
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
    assert killed_write(write_wb2(analyses(1), tmp_path / "other.zarr"), path) == 9
    assert [*tmp_path.glob(".out.*.partial.zarr")]
    with open_wb2(path, FEW) as opened:
        assert torch.equal(to_tensor(opened, FEW), states(3))
    write_wb2(analyses(1), path, overwrite=True)
    with open_wb2(path, FEW) as opened:
        assert torch.equal(to_tensor(opened, FEW), states(3, seed=1))


def test_store_set_aside_by_a_killed_call_comes_back(tmp_path, refused):
    path = write_wb2(analyses(), tmp_path / "out.zarr")
    path.rename(tmp_path / ".out.zarr.previous")
    refused("exists", write_wb2, analyses(1), path)
    with open_wb2(path, FEW) as opened:
        assert torch.equal(to_tensor(opened, FEW), states(3))


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
def test_other_schemas_are_refused(spoil, words, tmp_path, refused):
    refused(words, write_wb2, spoil(analyses()), tmp_path / "out.zarr")
    assert list(tmp_path.iterdir()) == []


def odd(path):
    """A store without any variable that is known."""
    with xr.open_dataset(path, engine="h5netcdf") as dataset:
        dataset[["wind_chill"]].to_netcdf(path.with_name("odd.nc"), engine="h5netcdf")
    return path.with_name("odd.nc")


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            lambda path: store_channels(path, levels=[850, 700]),
            r"store.nc: level 700 is missing, found (500, 850|850, 500)",
        ),
        (
            lambda path: store_channels(path, ["salinity"]),
            r"variable salinity is missing, found .*wind_chill",
        ),
        (
            lambda path: store_channels(odd(path)),
            r"holds no variable of 10m_u.*found wind_chill; name",
        ),
        (
            lambda path: write_wb2(analyses(), "gs://bucket/out.zarr"),
            r"gs://bucket/out\.zarr is a URL, expected a local folder",
        ),
        (
            lambda path: to_dataset(states(3), FEW, SMALL, times=TIMES, leads=LEADS),
            r"shape \(3, 5, 6, 8\), expected \(time, prediction",
        ),
        (
            lambda path: to_dataset(states(3), FEW, regular_grid(4, 8, poles=False), times=TIMES),
            r"expected \(time, \*\(5, 4, 8\)\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(path, refused, words):
    with pytest.raises((GatesError, ValueError), match=words):
        refused(path)
