"""Whole stores on another grid."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from core_gates.errors import GatesError
from weather.data.axes import dataset_grid
from weather.grid import Regridder, named_grid, regular_grid
from weather.operations import regridding
from weather.operations.regridding import read_grid, regrid_store

FINE, COARSE = regular_grid(19, 36, poles=True), regular_grid(8, 12, poles=False)
TIMES = np.datetime64("2020-02-28T18", "ns") + np.arange(3) * np.timedelta64(6, "h")
FIELD = ("time", "level", "latitude", "longitude")


def fields(seed=0):
    draw = np.random.default_rng(seed)
    shape = (3, 2, *FINE.shape)
    return xr.Dataset(
        {
            "temperature": (FIELD, 260 + draw.normal(size=shape).astype("f4"), {"units": "K"}),
            "geopotential": (FIELD, (5e4 + 1e3 * draw.normal(size=shape)).astype("f4")),
            "land_sea_mask": (FIELD[2:], draw.random(FINE.shape) > 0.5),
            "solar_constant": ("time", np.array([1361.0, 1362.0, 1363.0])),
        },
        {
            "time": TIMES,
            "level": ("level", [850, 500], {"units": "hPa"}),
            "latitude": FINE.latitude.numpy(),
            "longitude": FINE.longitude.numpy(),
        },
        {"institution": "none"},
    )


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.zarr"
    fields().to_zarr(path, zarr_format=2)
    return path


def expected(dataset, name, grid=COARSE, method="conservative"):
    values = torch.from_numpy(dataset[name].values.astype("f8"))
    return Regridder(dataset_grid(dataset), grid, method)(values).numpy()


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
def test_every_field_is_regridded_and_all_else_kept(source, tmp_path, method):
    found = regrid_store(source, COARSE, tmp_path / "o.zarr", method=method, attributes={"by": "x"})
    with xr.open_zarr(found.path, consolidated=True) as new:
        new = new.load()
    for name in ("temperature", "geopotential", "land_sea_mask"):
        np.testing.assert_allclose(new[name], expected(fields(), name, method=method), rtol=2e-7)
        assert new[name].dtype == np.float32
    field = new["temperature"]
    assert (field.dims, field.encoding["chunks"]) == (FIELD, (1, 2, 8, 12))
    units = {name: new[name].attrs["units"] for name in ("temperature", "level", "latitude")}
    assert units == {"temperature": "K", "level": "hPa", "latitude": "degrees_north"}
    assert new["solar_constant"].values.tolist() == [1361, 1362, 1363]
    way = f"{method}, from 36x19 longitudes by latitudes"
    facts = {"institution": "none", "by": "x", "regridding": way, "regridded_from": str(source)}
    assert new.attrs == facts
    np.testing.assert_array_equal(new["time"], TIMES)
    assert (found.missing, found.left_out) == ({}, [])
    assert dataset_grid(new) == COARSE
    time = zarr.open_consolidated(found.path, zarr_format=2)["time"]
    assert (time.dtype, time.attrs["units"]) == (np.int64, "seconds since 1970-01-01")


DIALECTS = {
    "longitudes from -180": lambda ds: ds.roll(longitude=18, roll_coords=True).assign_coords(
        longitude=np.arange(-180.0, 180.0, 10.0)
    ),
    "rows from the south": lambda ds: ds.isel(latitude=slice(None, None, -1)),
    "columns before rows": lambda ds: ds.transpose("longitude", "latitude", ...),
    "other names": lambda ds: ds.rename(latitude="lat", longitude="lon"),
    "a member": lambda ds: ds.expand_dims(number=[3], axis=1),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_give_the_same_fields(dialect, tmp_path):
    DIALECTS[dialect](fields()).to_zarr(tmp_path / "in.zarr", zarr_format=2)
    regrid_store(tmp_path / "in.zarr", COARSE, tmp_path / "o.zarr")
    with xr.open_zarr(tmp_path / "o.zarr") as new:
        for name in ("temperature", "land_sea_mask"):
            values = new[name].values.reshape(expected(fields(), name).shape)
            np.testing.assert_allclose(values, expected(fields(), name), rtol=2e-7)


def test_packed_netcdf_forecasts_and_climatologies(tmp_path):
    packed = fields()[["temperature"]].rename(level="hour", time="dayofyear")
    packed = packed.assign_coords(hour=[0, 12], dayofyear=[1, 2, 3])
    packing = {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 260.0, "_FillValue": -32768}
    packed.to_netcdf(tmp_path / "c.nc", encoding={"temperature": packing}, engine="h5netcdf")
    regrid_store(tmp_path / "c.nc", COARSE, tmp_path / "c.zarr")
    with xr.open_zarr(tmp_path / "c.zarr") as new:
        assert new["temperature"].encoding["chunks"] == (1, 1, 8, 12)
        close = expected(fields(), "temperature")
        np.testing.assert_allclose(new["temperature"], close, atol=1e-3)
    leads = np.array([0, 6], "timedelta64[h]").astype("timedelta64[ns]")
    lead = fields()[["temperature"]].rename(level="prediction_timedelta")
    lead.assign_coords(prediction_timedelta=leads).to_zarr(tmp_path / "f.zarr", zarr_format=2)
    regrid_store(tmp_path / "f.zarr", COARSE, tmp_path / "fo.zarr")
    raw = zarr.open_consolidated(tmp_path / "fo.zarr", zarr_format=2)
    assert raw["prediction_timedelta"].attrs["units"] == "nanoseconds"


def test_small_blocks_give_the_same_bytes(source, tmp_path, monkeypatch):
    regrid_store(source, COARSE, tmp_path / "one.zarr")
    monkeypatch.setattr(regridding, "BLOCK_BYTES", 1)
    regrid_store(source, COARSE, tmp_path / "many.zarr")
    assert contents(tmp_path / "one.zarr") == contents(tmp_path / "many.zarr")


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_call_is_continued(source, tmp_path, monkeypatch, at):
    """Killed when a block has been written and before that is recorded, and after some were."""
    monkeypatch.setattr(regridding, "BLOCK_BYTES", 1)
    monkeypatch.setattr(regridding, "SAVED_EVERY", 0.0)
    regrid_store(source, COARSE, tmp_path / "whole.zarr")
    write, written = regridding.StreamedStore.write, []

    def dying(self, *words):
        written.append(words)
        write(self, *words)
        if len(written) == at:
            os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setattr(regridding.StreamedStore, "write", dying)
        regrid_store(source, COARSE, tmp_path / "o.zarr")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "o.zarr").exists()
    monkeypatch.setattr(
        regridding.StreamedStore, "write", lambda self, *w: (written.append(w), write(self, *w))
    )
    regrid_store(source, COARSE, tmp_path / "o.zarr")
    assert len(written) == 7 - (at - 1)  # 3 + 3 + 1 blocks
    assert contents(tmp_path / "o.zarr") == contents(tmp_path / "whole.zarr")
    assert not list(tmp_path.glob(".*"))


def test_missing_values_propagate_or_are_refused(tmp_path, refused):
    holed = fields()
    holed["temperature"][1, 0, 9, 18] = np.nan
    holed.to_zarr(tmp_path / "in.zarr", zarr_format=2)
    found = regrid_store(tmp_path / "in.zarr", COARSE, tmp_path / "o.zarr")
    before, after = found.missing["temperature"]
    assert before == 1 / holed["temperature"].size
    with xr.open_zarr(tmp_path / "o.zarr") as new:
        holes = np.isnan(new["temperature"].values)
        assert after == holes.mean()
        assert 1 <= holes[1, 0].sum() == holes.sum() <= 4
    refused(
        r"in\.zarr: temperature is missing \(NaN\) in 0\.\d+ %",
        regrid_store,
        tmp_path / "in.zarr",
        COARSE,
        tmp_path / "no.zarr",
        missing="refuse",
    )
    assert not list(tmp_path.glob("*no.zarr*"))


def test_the_grid_of_a_store_keeps_its_order(tmp_path, source):
    assert read_grid(source) == FINE
    turned = DIALECTS["longitudes from -180"](DIALECTS["rows from the south"](fields()))
    turned.to_zarr(tmp_path / "turned.zarr", zarr_format=2)
    grid = read_grid(tmp_path / "turned.zarr")
    assert (float(grid.latitude[0]), float(grid.longitude[0])) == (-90, -180)
    regrid_store(source, grid, tmp_path / "o.zarr")
    with xr.open_zarr(tmp_path / "o.zarr") as new:
        np.testing.assert_allclose(new["temperature"], turned["temperature"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "edge", "method"),
    [
        ("64x32_equiangular_conservative", (32, 64), 87.1875, "conservative"),
        ("240x121_equiangular_with_poles_conservative", (121, 240), 90.0, "conservative"),
        ("240x121_equiangular_with_poles", (121, 240), 90.0, None),
        ("1440x721", (721, 1440), 90.0, None),
        ("64x32", (32, 64), 87.1875, None),
        ("64x32_gaussian_bilinear", (32, 64), 85.7606, "bilinear"),
    ],
)
def test_names_of_grids(name, shape, edge, method):
    grid, stated = named_grid(name)
    assert (grid.shape, stated) == (shape, method)
    assert (float(grid.latitude[0]), float(grid.longitude[0])) == (pytest.approx(edge, abs=1e-4), 0)


def test_what_is_not_a_name(refuses):
    assert named_grid("64x") is None
    assert named_grid("era5.zarr") is None
    refuses(
        GatesError,
        ("no rows on the poles: drop _with_poles", lambda: named_grid("64x32_gaussian_with_poles")),
        (
            "64x1_equiangular_with_poles is no grid",
            lambda: named_grid("64x1_equiangular_with_poles"),
        ),
    )


FAULTS = {
    "no field": (lambda ds: ds[["solar_constant"]], "no dimension latitude|holds no variable"),
    "half a globe": (lambda ds: ds.isel(latitude=slice(0, 9)), "covers .* only, expected a global"),
    "text": (lambda ds: ds.assign(a=(FIELD[2:], np.full(FINE.shape, "x"))), "a holds .*numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_stores(fault, tmp_path):
    change, words = FAULTS[fault]
    change(fields()).to_zarr(tmp_path / "in.zarr", zarr_format=2)
    with pytest.raises(GatesError, match=words) as caught:
        regrid_store(tmp_path / "in.zarr", COARSE, tmp_path / "o.zarr")
    assert str(caught.value).startswith(str(tmp_path / "in.zarr"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.zarr"]


def test_a_damaged_chunk_is_named(source, tmp_path, refused):
    next(Path(source, "temperature").glob("0.*")).write_bytes(b"nothing like a chunk")
    refused(
        r"source\.zarr: temperature cannot be read",
        regrid_store,
        source,
        COARSE,
        tmp_path / "o.zarr",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source.zarr"]
