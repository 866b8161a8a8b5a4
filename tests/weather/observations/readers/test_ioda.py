"""IODA files written with h5py alone, in the layout of versions 2 and 3."""

import h5py
import numpy as np
import pytest

from core_gates.errors import GatesError
from weather.observations.readers.ioda import read_ioda
from weather.variables import GRAVITY

FILL = np.float32(-3.3687953e38)
EPOCH = "seconds since 1970-01-01T00:00:00Z"
TIMES = np.array([1483358400, 1483358730, 1483361999], dtype=np.int64)  # 2017-01-02 12:00:00 ...


def dataset(group, name, values, units=None, fill=None):
    data = group.create_dataset(name, data=values)
    if units is not None:
        data.attrs["units"] = units
    if fill is not None:
        data.attrs["_FillValue"] = np.array([fill], dtype=data.dtype)
    return data


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sondes.nc4"


@pytest.fixture
def write(path):
    """``write(ObsValue={...}, ...)``: three reports, and a group for each argument."""

    def write(times=TIMES, units=EPOCH, pressure=(85_000.0, 50_000.0, 25_000.0), **groups):
        with h5py.File(path, "w") as file:
            meta = file.create_group("MetaData")
            dataset(file, "Location", np.arange(len(times)))
            dataset(meta, "dateTime", times, units)
            dataset(meta, "latitude", np.array([42.5, 42.25, -90.0], np.float32), "degrees_north")
            dataset(meta, "longitude", np.array([-73.75, 286.5, 0.0], np.float32), "degrees_east")
            meta["stationIdentification"] = np.array(["72518", "72518", "89009"], dtype=object)
            if pressure is not None:
                dataset(meta, "pressure", np.array(pressure, np.float32), "Pa", FILL)
            for group, variables in groups.items():
                made = file.create_group(group)
                for name, (values, *rest) in variables.items():
                    dataset(made, name, np.array(values), *rest)
        return path

    return write


def rows(found, variable):
    return found.frame[found.frame["variable"] == variable].reset_index(drop=True)


def test_values_errors_times_and_places_are_exact(write):
    found = read_ioda(
        write(
            ObsValue={
                "airTemperature": (np.array([271.25, 249.5, FILL], np.float32), "K", FILL),
                "windEastward": (np.array([5.5, -3.25, 1.0], np.float32), "m s-1"),
                "windNorthward": (np.array([0.5, 7.75, 2.0], np.float32), "m/s"),
                "specificHumidity": (np.array([0.004, 0.0005, 1e-6], np.float32), "kg kg-1"),
                "height": (np.array([1450.0, 5500.0, 10_000.0], np.float32), "m"),
            },
            ObsError={"airTemperature": (np.array([0.75, 1.25, FILL], np.float32), "K", FILL)},
        )
    )
    assert found.reports == 3
    temperature = rows(found, "temperature")
    assert temperature["value"].tolist() == [271.25, 249.5]
    assert temperature["error"].tolist() == [0.75, 1.25]
    assert temperature["level_hpa"].tolist() == [850.0, 500.0]
    assert temperature["time"].astype(str).tolist() == [
        "2017-01-02 12:00:00",
        "2017-01-02 12:05:30",
    ]
    assert temperature["latitude"].tolist() == [42.5, 42.25]
    assert temperature["longitude"].tolist() == [-73.75, 286.5]
    assert temperature["station"].tolist() == ["72518", "72518"]
    assert rows(found, "u_component_of_wind")["value"].tolist() == [5.5, -3.25, 1.0]
    assert rows(found, "v_component_of_wind")["value"].tolist() == [0.5, 7.75, 2.0]
    np.testing.assert_allclose(
        rows(found, "geopotential")["value"], np.array([1450.0, 5500.0, 10_000.0]) * GRAVITY
    )
    assert rows(found, "specific_humidity")["value"].tolist() == [
        float(np.float32(0.004)), float(np.float32(0.0005)),
    ]  # fmt: skip
    assert found.rejected == {"humidity above 300 hPa": 1}


@pytest.mark.parametrize(
    ("times", "units", "expected"),
    [
        (np.array([0, 60, 61], np.int64), "minutes since 2017-01-01", "2017-01-01 01:01:00"),
        (np.array([0.0, 1.0, 1.5]), "hours since 2017-01-01T12:00:00Z", "2017-01-01 13:30:00"),
        (np.array(["2017-01-01T00:00:00Z"] * 3, dtype=object), None, "2017-01-01 00:00:00"),
    ],
)
def test_times_have_an_epoch_or_are_text(times, units, expected, write):
    values = {"airTemperature": (np.array([270.0, 260.0, 230.0]), "K")}
    assert str(read_ioda(write(times, units, ObsValue=values)).frame["time"][2]) == expected


def test_units_are_converted_and_unknown_ones_refused(write):
    values = {
        "airTemperature": (np.array([-2.0, -20.0, -50.0]), "degC"),
        "windSpeed": (np.array([10.0, 20.0, 30.0]), "kt"),
        "windDirection": (np.array([270.0, 180.0, 90.0]), "degrees"),
    }
    found = read_ioda(write(ObsValue=values, ObsError={"airTemperature": (np.ones(3), "degC")}))
    assert rows(found, "temperature")["value"].tolist() == pytest.approx([271.15, 253.15, 223.15])
    assert rows(found, "temperature")["error"].tolist() == [1.0, 1.0, 1.0]
    speed = np.array([10, 20, 30]) * 0.514444
    assert rows(found, "u_component_of_wind")["value"].tolist() == pytest.approx(
        [speed[0], 0.0, -speed[2]]
    )
    values["airTemperature"] = (np.array([70.0, 60.0, 50.0]), "degF")
    with pytest.raises(GatesError, match=r"airTemperature is in 'degF', expected K; convert it"):
        read_ioda(write(ObsValue=values))


@pytest.mark.parametrize(
    ("groups", "kept", "reason"),
    [
        ({"PreQC": [0, 3, 9]}, 2, "flagged by PreQC"),
        ({"EffectiveQC": [0, 1, 0]}, 2, "flagged by EffectiveQC"),
        ({"QualityMarker": [2, 4, 15]}, 1, "flagged by QualityMarker"),
        ({"PreQC": [9, 9, 9], "EffectiveQC0": [0, 10, 0], "EffectiveQC1": [0, 0, 0]}, 3, None),
    ],
)
def test_flags_reject(groups, kept, reason, write):
    name = "airTemperature"
    flags = {group: {name: (np.array(v, np.int32),)} for group, v in groups.items()}
    found = read_ioda(write(ObsValue={name: (np.array([270.0, 260.0, 230.0]), "K")}, **flags))
    assert len(found.frame) == kept
    assert found.rejected == ({reason: 3 - kept} if reason else {})


def test_reports_with_the_pressure_of_a_station_are_of_the_surface(write):
    values = {
        "stationPressure": (np.array([99_500.0, 101_000.0, 68_000.0]), "Pa"),
        "airTemperature": (np.array([270.0, 280.0, 240.0]), "K"),
    }
    found = read_ioda(write(ObsValue=values))
    assert set(found.frame["variable"]) == {"surface_pressure", "2m_temperature"}
    assert found.frame["level_hpa"].isna().all()


def test_types_of_prepbufr_tell_the_surface_and_no_pressure_does(write):
    values = {"air_temperature": (np.array([270.0, 280.0, 240.0]), "K")}
    kinds = {"air_temperature": (np.array([120, 181, 187], np.int32),)}
    found = read_ioda(write(ObsValue=values, ObsType=kinds))
    assert sorted(found.frame["variable"]) == ["2m_temperature", "2m_temperature", "temperature"]
    assert set(read_ioda(write(pressure=None, ObsValue=values)).frame["variable"]) == {
        "2m_temperature"
    }


def test_virtual_temperatures_are_dried(write):
    values = {
        "virtualTemperature": (np.array([272.0, 252.0, 232.0]), "K"),
        "specificHumidity": (np.array([0.004, np.nan, 1e-4]), "kg kg-1"),
        "rainfall": (np.ones(3), "mm"),
    }
    found = read_ioda(write(ObsValue=values))
    expected = [272.0 / (1 + (1 / 0.622 - 1) * 0.004), 232.0 / (1 + (1 / 0.622 - 1) * 1e-4)]
    assert rows(found, "temperature")["value"].tolist() == pytest.approx(expected, rel=1e-12)
    assert found.rejected["virtual temperature without humidity"] == 1
    assert found.note == "not converted: rainfall"


@pytest.mark.parametrize("numbered", [True, False])
def test_soundings_are_hydrostatic(numbered, write, path):
    values = {
        "airTemperature": (np.array([283.0, 272.0, 230.0]), "K"),
        "height": (np.array([1457.0, 3512.0, 10_000.0]), "m"),  # 500 m too high at 700 hPa
    }
    times = TIMES if numbered else TIMES[[0, 0, 2]]
    write(times, pressure=(85_000.0, 70_000.0, 50_000.0), ObsValue=values)
    if numbered:
        with h5py.File(path, "a") as file:
            file["MetaData/sequenceNumber"] = np.array([7, 7, 8])
    found = read_ioda(path)
    assert found.rejected == {"hydrostatic check": 4}
    assert rows(found, "geopotential")["level_hpa"].tolist() == [500.0]


def test_masked_integers_and_empty_variables_are_missing(write):
    values = {
        "airTemperature": (np.array([270, -999, 230], np.int32), "K", -999),
        "windEastward": (np.full(3, np.nan), "m s-1"),
    }
    found = read_ioda(write(ObsValue=values))
    assert rows(found, "temperature")["value"].tolist() == [270.0, 230.0]
    assert len(found.frame) == 2
    assert not found.rejected


def test_damaged_files_are_refused(write, path):
    content = write(
        ObsValue={"airTemperature": (np.array([270.0, 260.0, 230.0]), "K")}
    ).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(GatesError, match="damaged or truncated NetCDF"):
        read_ioda(path)


def test_a_file_without_epoch_or_place_is_refused(write, path):
    values = {"airTemperature": (np.array([270.0, 260.0, 230.0]), "K")}
    with pytest.raises(GatesError, match="dateTime is in '', expected seconds since a date"):
        read_ioda(write(units="", ObsValue=values))
    with h5py.File(write(ObsValue=values), "a") as file:
        del file["MetaData/latitude"]
    with pytest.raises(GatesError, match="lacks MetaData/latitude"):
        read_ioda(path)


def test_channels_are_refused(write):
    radiances = {"airTemperature": (np.ones((3, 4)), "K")}
    with pytest.raises(GatesError, match="2 dimensions, expected numbers by location"):
        read_ioda(write(ObsValue=radiances))
