import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import xarray as xr

from core_gates.errors import GatesError
from weather.data.axes import dataset_grid, to_tensor
from weather.data.store import open_wb2
from weather.state import ChannelSpec

spec = spec_from_file_location("make", Path(__file__).parents[2] / "data/weatherbench2/make.py")
make = module_from_spec(spec)
spec.loader.exec_module(make)

CHANNELS, zarr, netcdf = make.CHANNELS, make.zarr, make.netcdf


def expected_fields(dataset):
    """The channels read by hand out of the official layout."""
    fields = [dataset[name].values for name in CHANNELS.surface]
    for name in CHANNELS.upper:
        fields += [dataset[name].values[:, make.LEVELS.index(level)] for level in CHANNELS.levels]
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
        file.write(netcdf(dataset, folder).read_bytes())
    return "memory://accepted/store.nc"


SHORT = {"geopotential": "z", "temperature": "t", "2m_temperature": "t2m"}
AXES = {"level": "pressure_level", "time": "valid_time", "latitude": "lat", "longitude": "lon"}

ACCEPTED = {
    "zarr 2": lambda ds, dir: zarr(ds, dir),
    "zarr 2, not consolidated": lambda ds, dir: zarr(ds, dir, consolidated=False),
    "zarr 3": lambda ds, dir: zarr(ds, dir, version=3, consolidated=False),
    "zarr as text": lambda ds, dir: str(zarr(ds, dir)),
    "zarr by file URL": lambda ds, dir: zarr(ds, dir).as_uri(),
    "zarr in memory": lambda ds, dir: to_memory(ds, "memory://accepted/store.zarr"),
    "netcdf 4": lambda ds, dir: netcdf(ds, dir),
    "netcdf 4 by URL": memory_netcdf,
    "netcdf 3": lambda ds, dir: netcdf(ds, dir, engine="scipy"),
    "netcdf packed and masked": lambda ds, dir: netcdf(ds, dir, encoding=packed(ds)),
    "open dataset": lambda ds, dir: ds,
    "longitude before latitude": lambda ds, dir: zarr(
        ds.transpose("time", "level", "longitude", "latitude"), dir
    ),
    "time last": lambda ds, dir: zarr(ds.transpose("level", "latitude", "longitude", "time"), dir),
    "latitude ascending": lambda ds, dir: zarr(ds.sortby("latitude"), dir),
    "lat and lon": lambda ds, dir: zarr(ds.rename(latitude="lat", longitude="lon"), dir),
    "names of the climate data store": lambda ds, dir: netcdf(ds.rename(SHORT | AXES), dir),
    "coordinate named apart from its dimension": lambda ds, dir: netcdf(
        ds.rename(latitude="lat").rename_vars(lat="latitude"), dir
    ),
    "longitude from -180": lambda ds, dir: zarr(west_first(ds), dir),
    "levels reversed": lambda ds, dir: zarr(ds.isel(level=[2, 1, 0]), dir),
    "levels shuffled": lambda ds, dir: zarr(ds.isel(level=[1, 2, 0]), dir),
    "levels as float": lambda ds, dir: zarr(ds.assign_coords(level=[500.0, 700.0, 850.0]), dir),
    "times unsorted": lambda ds, dir: zarr(ds.isel(time=[2, 0, 3, 1]), dir),
    "times in seconds": lambda ds, dir: zarr(
        ds.assign_coords(time=ds.time.values.astype("datetime64[s]")), dir
    ),
    "float64": lambda ds, dir: zarr(ds.astype(np.float64), dir),
    "a dimension of size 1": lambda ds, dir: zarr(ds.expand_dims(expver=[1], axis=2), dir),
    "other variables": lambda ds, dir: zarr(
        ds.assign(orography=ds["2m_temperature"][0] * np.nan, name=((), "label")), dir
    ),
    "auxiliary coordinates": lambda ds, dir: zarr(
        ds.assign_coords(day=("time", np.arange(4)), step=0), dir
    ),
}


@pytest.mark.parametrize("variant", ACCEPTED)
def test_variants_are_one_dataset(variant, tmp_path):
    source = ACCEPTED[variant](make.official(), tmp_path)
    rtol = 2e-7 if "packed" in variant else 0  # unpacking rounds twice
    with open_wb2(source, CHANNELS) as dataset:
        torch.testing.assert_close(
            to_tensor(dataset, CHANNELS), expected_fields(make.official()), rtol=rtol, atol=0
        )
        for name in ("latitude", "longitude", "time"):
            np.testing.assert_array_equal(dataset[name], make.official()[name])
        assert dataset["time"].dtype == "datetime64[ns]"
        assert dataset["level"].dtype == np.int64
        assert dataset["level"].values.tolist() == [850, 500]
        assert dataset["temperature"].dims == ("time", "level", "latitude", "longitude")
        assert set(dataset.coords) == {"time", "level", "latitude", "longitude"}


def test_duplicate_times_keep_the_first_on_request(tmp_path):
    sound = make.official()
    later = sound.isel(time=[1]) + 1
    path = zarr(xr.concat([sound, later], "time"), tmp_path)
    with open_wb2(path, CHANNELS, drop_duplicate_times=True) as dataset:
        torch.testing.assert_close(to_tensor(dataset, CHANNELS), expected_fields(sound))


def test_missing_values_on_request_are_reported(tmp_path):
    sound = make.official()
    sound["geopotential"][1, ..., 3] = np.nan
    path = zarr(sound, tmp_path)
    with open_wb2(path, CHANNELS, allow_missing=True) as dataset:
        share = dataset["geopotential"].attrs["missing_fraction"]
        assert share == pytest.approx(1 / 3 / 16)
        assert dataset["temperature"].attrs["missing_fraction"] == 0
        with pytest.raises(GatesError, match=r"z850 is missing \(NaN\) in 1.56 % of the values"):
            to_tensor(dataset, CHANNELS)
        assert to_tensor(dataset, CHANNELS, allow_missing=True).isnan().sum() == 2 * 8


def test_missing_value_outside_the_sample_is_found_when_read(tmp_path):
    dataset = make.official(times=9)
    dataset["temperature"][1, 0, 0, 0] = np.nan
    with open_wb2(zarr(dataset, tmp_path), CHANNELS) as opened:
        to_tensor(opened.isel(time=[0, 2]), CHANNELS)
        with pytest.raises(GatesError, match="t500 is missing"):
            to_tensor(opened, CHANNELS)


def test_large_forecasts_are_sampled_at_their_ends(monkeypatch):
    monkeypatch.setattr("weather.data.axes.BUDGET_BYTES", 5 * 16 * 8 * 4)
    leads = np.arange(5).astype("timedelta64[h]").astype("timedelta64[ns]")
    dataset = make.official().expand_dims(lead_time=leads, axis=1).copy(deep=True)
    dataset["temperature"][0, 2] = np.nan
    open_wb2(dataset, CHANNELS)
    dataset["temperature"][0, 4, 0, 0, 0] = np.nan
    with pytest.raises(GatesError, match="temperature is missing"):
        open_wb2(dataset, CHANNELS)


def test_uneven_steps_are_accepted_unless_a_step_is_required(tmp_path):
    path = zarr(make.official().isel(time=[0, 1, 3]), tmp_path)
    open_wb2(path, CHANNELS).close()
    words = "1 of 2 time steps are not 6 h, the first is 12 h after 2017-01-01 06:00"
    with pytest.raises(GatesError, match=words):
        open_wb2(path, CHANNELS, hours=6)
    even = zarr(make.official(), tmp_path, name="even.zarr")
    open_wb2(even, CHANNELS, hours=6).close()


def test_scalar_time_becomes_a_dimension(tmp_path):
    with open_wb2(netcdf(make.official().isel(time=2), tmp_path), CHANNELS) as dataset:
        torch.testing.assert_close(
            to_tensor(dataset, CHANNELS), expected_fields(make.official())[2:3]
        )


def test_forecast_ensembles_keep_their_dimensions(tmp_path):
    leads = np.array([0, 6, 12], "timedelta64[h]").astype("timedelta64[ns]")
    dataset = make.official().expand_dims(member=[0, 1], lead_time=leads)
    dataset = (dataset * (1 + 1e-3 * dataset.member)).drop_vars("member")
    with open_wb2(zarr(dataset, tmp_path), CHANNELS) as opened:
        assert opened["number"].values.tolist() == [0, 1]
        assert opened["temperature"].dims[:4] == ("time", "prediction_timedelta", "number", "level")
        np.testing.assert_array_equal(opened["prediction_timedelta"], leads)
        fields = to_tensor(opened, CHANNELS)
    assert fields.shape == (4, 3, 2, 6, 8, 16)
    base = expected_fields(make.official())
    torch.testing.assert_close(fields[:, 2, 0], base)
    torch.testing.assert_close(fields[:, 1, 1], base * 1.001)


def test_without_channels_everything_on_the_grid_is_kept(tmp_path):
    dataset = make.official().isel(level=[2, 0, 1]).assign(label=("time", np.arange(4)))
    with open_wb2(zarr(dataset, tmp_path)) as opened:
        assert set(opened.data_vars) == {*make.SURFACE, *make.MEAN}
        assert opened["level"].values.tolist() == [500, 700, 850]
        assert dataset_grid(opened).shape == (8, 16)
    with pytest.raises(GatesError, match="no variable on the grid; name a store with fields"):
        open_wb2(xr.Dataset({"a": 1.0}, {"latitude": [1.0], "longitude": [1.0]}))


def test_opening_does_not_change_a_given_dataset():
    dataset = make.official()
    copy = dataset.copy(deep=True)
    open_wb2(dataset, CHANNELS)
    xr.testing.assert_identical(dataset, copy)


def test_only_what_is_needed_is_read(tmp_path):
    """A century of 0.25-degree fields (9 TB, all chunks absent and so the fill value) opens."""
    import zarr as zarr_package

    path = tmp_path / "huge.zarr"
    group = zarr_package.open_group(path, mode="w", zarr_format=3)
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
