"""Datasets and stores that are refused, in one line that names the fault and the fix."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from core_gates.errors import GatesError
from weather.data.axes import to_tensor
from weather.data.store import naming, open_wb2
from weather.data.writing import write_wb2

spec = spec_from_file_location("make", Path(__file__).parents[2] / "data/weatherbench2/make.py")
make = module_from_spec(spec)
spec.loader.exec_module(make)

CHANNELS, zarr, netcdf = make.CHANNELS, make.zarr, make.netcdf


def change(name, function):
    """A fault in the values of one variable."""
    return lambda ds: ds.assign({name: function(ds[name])})


def coordinate(name, values, **attributes):
    return lambda ds: ds.assign_coords({name: (name, values, attributes)})


def spoil(ds, name, value):
    array = ds[name].copy(deep=True)
    array[1, ..., 3] = value
    return ds.assign({name: array})


DAY = np.datetime64("2017-01-01", "ns")

# what is wrong -> (how a sound dataset gets it, words of the error: the fault and the fix)
FAULTY_DATASETS = {
    "no level": (
        lambda ds: ds.isel(level=0, drop=True),
        "no dimension level for geopotential, temperature.*choose surface variables",
    ),
    "missing variables": (
        lambda ds: ds.drop_vars(["geopotential", "2m_temperature"]),
        "variable 2m_temperature, geopotential is missing, found.*choose channels that exist",
    ),
    "missing level": (lambda ds: ds.isel(level=[1, 2]), "level 500 is missing, found 700, 850"),
    "empty time axis": (lambda ds: ds.isel(time=[]), "time is empty; choose a period"),
    "no time": (lambda ds: ds.isel(time=0, drop=True), "no dimension time.*rename or add it"),
    "climatology": (
        lambda ds: ds.rename(time="hour").expand_dims(dayofyear=[1, 2]),
        "is a climatology.*name a time series",
    ),
    "no latitude": (
        lambda ds: ds.rename(latitude="y"),
        "no dimension latitude .or lat., found time, y, longitude, level; rename",
    ),
    "no values of latitude": (
        lambda ds: ds.drop_vars("latitude"),
        "dimension latitude has no values; write its coordinate",
    ),
    "curvilinear": (
        lambda ds: ds.rename(latitude="y", longitude="x").assign_coords(
            latitude=(("y", "x"), np.zeros((8, 16)))
        ),
        "latitude has the dimensions y, x.*regrid it",
    ),
    "duplicate times": (
        lambda ds: ds.isel(time=[0, 1, 1, 2]),
        "1 of 4 times are duplicates, the first is 2017-01-01 06:00; drop them",
    ),
    "NaT": (
        coordinate("time", [DAY, np.datetime64("NaT"), DAY, DAY]),
        "1 of 4 times are NaT; drop them",
    ),
    "times without units": (coordinate("time", [0, 6, 12, 18]), "time holds int64.*set its attr"),
    "latitude shuffled": (
        lambda ds: ds.isel(latitude=[0, 2, 1, 3, 4, 5, 6, 7]),
        "latitude is not monotonic .*; sort the fields",
    ),
    "latitude beyond the pole": (
        lambda ds: ds.assign_coords(latitude=ds.latitude * 2),
        "latitude reaches 157.5.*correct it",
    ),
    "latitude in radians": (
        lambda ds: ds.assign_coords(latitude=np.deg2rad(ds.latitude)),
        "latitude covers -1.37.* only.*; convert the radians",
    ),
    "latitude is NaN": (
        lambda ds: ds.assign_coords(latitude=ds.latitude.where(ds.latitude < 70)),
        "latitude holds NaN.*drop those",
    ),
    "northern hemisphere only": (
        lambda ds: ds.isel(latitude=slice(0, 4)),
        "latitude covers 11.25 to 78.75 degrees only, expected a global grid; choose a global",
    ),
    "longitude repeated": (
        lambda ds: ds.pad(longitude=(0, 1), mode="wrap").assign_coords(
            longitude=np.linspace(0, 360, 17)
        ),
        "longitude 0 occurs twice .*drop the repeated meridian",
    ),
    "longitude outside": (
        lambda ds: ds.assign_coords(longitude=ds.longitude + 90),
        "longitude covers 90 to 427.5.*correct it",
    ),
    "region": (
        lambda ds: ds.isel(longitude=slice(0, 5)),
        "longitude covers 0, 22.5, .* gap of 270.*choose a global store",
    ),
    "levels in Pa": (
        lambda ds: ds.assign_coords(level=ds.level * 100),
        "level reaches 85000, expected hPa; it looks like Pa: divide by 100",
    ),
    "level repeated": (
        lambda ds: ds.isel(level=[0, 1, 1, 2]),
        "level repeats a value in 500, 700, 700, 850; drop",
    ),
    "levels as text": (
        coordinate("level", ["500", "700", "850"]),
        "level holds .*, expected numbers; convert it",
    ),
    "negative level": (coordinate("level", [-5, 700, 850]), "level holds -5, expected positive"),
    "celsius": (
        change("temperature", lambda a: a - 273.15),
        "temperature ranges from .*150 to 350 K; it looks like degrees Celsius: add 273.15",
    ),
    "hectopascal": (
        change("mean_sea_level_pressure", lambda a: a / 100),
        "mean_sea_level_pressure .*looks like hPa: multiply by 100",
    ),
    "geopotential height": (
        change("geopotential", lambda a: a / 9.80665),
        "geopotential at 850 hPa averages 14.* height in m: multiply by 9.8",
    ),
    "out of range": (
        change("2m_temperature", lambda a: a * 10),
        "2m_temperature ranges from .*expected 150 to 350 K; check its unit and its scale_factor",
    ),
    "unmasked fill value": (
        lambda ds: spoil(ds, "temperature", 1e20),
        "temperature ranges .* to 1e.20, which is a fill value; set the attribute _FillValue",
    ),
    "NaN": (
        lambda ds: spoil(ds, "geopotential", np.nan),
        "geopotential is missing .NaN. in 2.08 % of the values sampled; fill",
    ),
    "infinite": (
        lambda ds: spoil(ds, "mean_sea_level_pressure", np.inf),
        "mean_sea_level_pressure is missing .NaN. in 2.08 %",
    ),
    "text values": (
        change("temperature", lambda a: a.astype(str)),
        "temperature holds .*, expected real numbers; convert it",
    ),
    "complex values": (
        change("temperature", lambda a: a.astype(np.complex64)),
        "temperature holds complex64, expected real numbers",
    ),
    "variable without time": (
        lambda ds: ds.assign(temperature=ds.temperature[0].drop_vars("time")),
        "temperature lacks the dimension time.*write it with all dimensions",
    ),
    "upper variable without level": (
        lambda ds: ds.assign(temperature=ds.temperature[:, 0].drop_vars("level")),
        "temperature lacks the dimension level",
    ),
    "surface variable with level": (
        change("2m_temperature", lambda a: a.expand_dims(level=[500, 700, 850])),
        "2m_temperature has the dimension level.*select one entry",
    ),
    "unknown dimension": (
        change("temperature", lambda a: a.expand_dims(scenario=[1, 2])),
        "temperature has the dimension scenario.*select one entry",
    ),
    "leads as integers": (
        lambda ds: ds.expand_dims(prediction_timedelta=[0, 6]),
        "prediction_timedelta holds int64, expected time differences; set its attribute 'units'",
    ),
    "negative leads": (
        lambda ds: ds.expand_dims(lead_time=np.array([-6, 0], "timedelta64[h]").astype("m8[ns]")),
        "prediction_timedelta holds NaT or negative leads; drop them",
    ),
    "repeated leads": (
        lambda ds: ds.expand_dims(step=np.array([6, 6], "timedelta64[h]").astype("m8[ns]")),
        "prediction_timedelta repeats a lead; drop",
    ),
}


@pytest.mark.parametrize("fault", FAULTY_DATASETS)
def test_faulty_datasets_are_refused_by_name(fault, tmp_path):
    spoiler, words = FAULTY_DATASETS[fault]
    assert_refused(zarr(spoiler(make.official()), tmp_path), words)


def assert_refused(source, words):
    with pytest.raises(GatesError, match=f"^{source}: .*{words}") as caught:
        open_wb2(source, CHANNELS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(source))


def truncated(ds, folder, engine):
    path = netcdf(ds, folder, engine=engine)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def written(folder, content, name="store.nc"):
    path = folder / name
    path.write_bytes(content)
    return path


def damaged(path, name, content):
    (path / name).write_bytes(content)
    return path


def lost_chunk(ds, folder):
    path = zarr(ds, folder, encoding={"temperature": {"chunks": (1, 3, 8, 16)}})
    (path / "temperature" / "3.0.0.0").unlink()
    return path


def unreadable_time(ds, folder, **attributes):
    times = xr.Variable("time", [0, 6, 12, 18], {"units": "hours since 2017-01-01"} | attributes)
    return zarr(ds.drop_vars("time").assign(time=times), folder)


FAULTY_STORES = {
    "absent": (lambda ds, dir: dir / "nowhere.zarr", "does not exist; check the path"),
    "misspelled": (
        lambda ds, dir: zarr(ds, dir, name="era5_2017.zarr").with_name("era5_2107.zarr"),
        "does not exist; did you mean era5_2017.zarr",
    ),
    "no store at all": (
        lambda ds, dir: dir,
        "directory without .zmetadata.*name the store inside it",
    ),
    "single array": (
        lambda ds, dir: zarr(ds, dir) / "temperature",
        "is a single Zarr array, expected a group.*name its parent",
    ),
    "single array of zarr 3": (
        lambda ds, dir: zarr(ds, dir, version=3, consolidated=False) / "temperature",
        "is a single Zarr array, expected a group.*name its parent",
    ),
    "bad metadata": (
        lambda ds, dir: damaged(zarr(ds, dir), ".zmetadata", b"{"),
        "Zarr metadata is not JSON; copy the store again",
    ),
    "damaged chunk": (
        lambda ds, dir: damaged(zarr(ds, dir), "temperature/0.0.0.0", b"no chunk"),
        "temperature cannot be read: .*; a chunk is damaged",
    ),
    "lost chunk": (lost_chunk, "temperature is missing .NaN. in 33.3 %"),
    "truncated netcdf 4": (
        lambda ds, dir: truncated(ds, dir, "h5netcdf"),
        "cannot be read: .*truncated or damaged, download it again",
    ),
    "truncated netcdf 3": (
        lambda ds, dir: truncated(ds, dir, "scipy"),
        "truncated or damaged, download it again",
    ),
    "text file": (
        lambda ds, dir: written(dir, b"time,temperature\n"),
        "is neither Zarr, NetCDF nor GRIB .17 bytes.*name another file or convert it",
    ),
    "empty file": (lambda ds, dir: written(dir, b""), "0 bytes.*download it again"),
    "zip": (lambda ds, dir: written(dir, b"PK\x03\x04...."), "is a zip archive: unpack it"),
    "gzip": (lambda ds, dir: written(dir, b"\x1f\x8b......"), "gzip: unpack it with gunzip"),
    "bufr": (lambda ds, dir: written(dir, b"BUFR....."), "BUFR file of observations.*convert"),
    "cdf 5": (lambda ds, dir: written(dir, b"CDF\x05....."), "CDF-5 format: convert it with"),
    "hdf 5 other than netcdf": (
        lambda ds, dir: written(dir, b"\x89HDF\r\n\x1a\n garbage"),
        "truncated or damaged, download",
    ),
    "time units": (
        lambda ds, dir: unreadable_time(ds, dir, units="hours since the flood"),
        "cannot be read as Zarr: .*time.*repair it",
    ),
    "calendar": (
        lambda ds, dir: unreadable_time(ds, dir, calendar="noleap"),
        "(time holds object|cannot be read as Zarr)",
    ),
    "protocol": (lambda ds, dir: "gopher://data/store.zarr", "cannot be reached: Protocol not"),
}


@pytest.mark.parametrize("fault", FAULTY_STORES)
def test_faulty_stores_are_refused_by_name(fault, tmp_path):
    build, words = FAULTY_STORES[fault]
    assert_refused(build(make.official(), tmp_path), words)


def test_grib_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(written(tmp_path, b"GRIB...."), "pip install cfgrib")


def test_a_damaged_chunk_outside_the_sample_is_one_line_with_the_store(tmp_path):
    path = tmp_path / "store.zarr"
    write_wb2(make.official(times=28)[[*CHANNELS.surface, *CHANNELS.upper]], path)
    damaged(path, "temperature/5.0.0.0", b"no chunk")
    words = f"^{path}: temperature cannot be read: .*; a chunk is damaged, copy the store again$"
    with open_wb2(path, CHANNELS) as opened:  # the times 0, 13 and 27 are sound
        with pytest.raises(GatesError, match=words), naming(path):
            to_tensor(opened, CHANNELS)
        to_tensor(opened.isel(time=slice(6, None)), CHANNELS)
