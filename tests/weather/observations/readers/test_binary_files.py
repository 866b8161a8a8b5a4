"""Readers of binary files: BUFR and IODA."""

import eccodes
import h5py
import numpy as np
import pytest

from core_gates.errors import GatesError, MissingExtraError
from weather.observations.readers.bufr import read_bufr, split_messages
from weather.observations.readers.ioda import read_ioda
from weather.variables import GRAVITY

LEVELS = (
    # elapsed s, Pa, gpm, displacements, K, K, degrees, m/s
    (0, 99_500.0, 112, 0.0, 0.0, 275.1, 272.3, 220, 5.1),
    (600, 85_000.0, 1360, 0.01, 0.02, 268.3, 260.0, 240, 12.3),
    (1500, 50_000.0, 5306, 0.05, 0.11, 250.1, None, 250, 25.0),
)
KEYS = (
    "timePeriod", "pressure", "nonCoordinateGeopotentialHeight", "latitudeDisplacement",
    "longitudeDisplacement", "airTemperature", "dewpointTemperature", "windDirection", "windSpeed",
)  # fmt: skip


def message(template, category, values, *, subsets=1, factors=(), extended=(), **header):
    """Return the bytes of a message."""
    handle = eccodes.codes_bufr_new_from_samples("BUFR4")
    try:
        for kind, numbers in (("Delayed", factors), ("ExtendedDelayed", extended)):
            if numbers:
                name = f"input{kind}DescriptorReplicationFactor"
                eccodes.codes_set_array(handle, name, list(numbers))
        defaults = {
            "edition": 4, "masterTableNumber": 0, "bufrHeaderCentre": 98,
            "masterTablesVersionNumber": 31, "localTablesVersionNumber": 0, "typicalYear": 2020,
            "typicalMonth": 1, "typicalDay": 2, "typicalHour": 0, "observedData": 1,
            "dataCategory": category, "numberOfSubsets": subsets,
            "compressedData": int(subsets > 1),
        }  # fmt: skip
        for key, value in (defaults | header).items():
            eccodes.codes_set(handle, key, value)
        eccodes.codes_set_array(handle, "unexpandedDescriptors", [template])
        for key, value in values.items():
            if isinstance(value, list):
                eccodes.codes_set_array(handle, key, value)
            else:
                eccodes.codes_set(handle, key, value)
        eccodes.codes_set(handle, "pack", 1)
        return eccodes.codes_get_message(handle)
    finally:
        eccodes.codes_release(handle)


def temp(levels=LEVELS, number=393, **header):
    values = {
        "blockNumber": 10, "stationNumber": number, "year": 2020, "month": 1, "day": 1, "hour": 23,
        "minute": 15, "second": 30, "latitude": 52.21, "longitude": 14.12,
        "heightOfStationGroundAboveMeanSeaLevel": 112.0,
    }  # fmt: skip
    for rank, level in enumerate(levels, 1):
        found = zip(KEYS, level, strict=True)
        values |= {f"#{rank}#{key}": value for key, value in found if value is not None}
    return message(309052, 2, values, factors=[0], extended=[len(levels)], **header)


def synop():
    values = {
        "blockNumber": [10, 11], "stationNumber": [393, 35], "latitude": [52.21, 48.25],
        "longitude": [14.12, 16.36], "year": 2020, "month": 1, "day": 2, "hour": 6, "minute": 0,
        "heightOfStationGroundAboveMeanSeaLevel": [112.0, 198.0],
        "nonCoordinatePressure": [100_100.0, 99_000.0],
        "pressureReducedToMeanSeaLevel": [101_500.0, 101_400.0],
        "airTemperature": [273.1, 274.2], "dewpointTemperature": [271.0, 272.0],
        "windDirection": [200, 270], "windSpeed": [3.2, 4.5],
    }  # fmt: skip
    return message(307080, 0, values, subsets=2, factors=[1] * 6)


def amdar():
    values = {
        "aircraftFlightNumber": "EU0123", "latitude": 50.03, "longitude": 8.57, "year": 2020,
        "month": 1, "day": 2, "hour": 6, "minute": 7, "height": 9140,
        "airTemperature": 228.4, "windDirection": 90, "windSpeed": 31.5,
    }  # fmt: skip
    return message(311001, 4, values)


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "reports.bufr"
        path.write_bytes(content)
        return read_bufr(path)

    return read


def values(found, variable):
    return found.frame[found.frame["variable"] == variable].set_index("level_hpa")["value"]


def test_a_sounding_is_exact_to_coded_precision(read):
    found = read(temp())
    assert (found.reports, found.rejected) == (3, {})
    temperature = values(found, "temperature")
    assert temperature.index.tolist() == [995.0, 850.0, 500.0]
    np.testing.assert_allclose(temperature, [275.1, 268.3, 250.1], rtol=0, atol=1e-9)
    geopotential = values(found, "geopotential")
    np.testing.assert_allclose(geopotential, np.array([112, 1360, 5306]) * GRAVITY, rtol=1e-12)
    u, v = (values(found, f"{name}_component_of_wind") for name in "uv")
    np.testing.assert_allclose(np.hypot(u, v), [5.1, 12.3, 25.0], rtol=1e-12)
    assert u[500.0] == pytest.approx(25 * np.sin(np.deg2rad(70)))
    humidity = values(found, "specific_humidity")
    assert humidity.index.tolist() == [995.0, 850.0]
    assert humidity[850.0] == pytest.approx(0.622 * 222.5 / (85_000 - 0.378 * 222.5), rel=2e-3)


def test_every_level_has_the_time_and_place_of_the_balloon(read):
    rows = read(temp()).frame.drop_duplicates("level_hpa").set_index("level_hpa")
    assert rows["time"].astype(str).tolist() == [
        "2020-01-01 23:15:30", "2020-01-01 23:25:30", "2020-01-01 23:40:30",
    ]  # fmt: skip
    np.testing.assert_allclose(rows["latitude"], [52.21, 52.22, 52.26], atol=1e-9)
    np.testing.assert_allclose(rows["longitude"], [14.12, 14.14, 14.23], atol=1e-9)
    assert (set(rows["station"]), set(rows["source"])) == ({"10393"}, {"radiosonde"})


def test_stations_are_of_the_surface(read):
    found = read(synop())
    assert found.reports == 2
    frame = found.frame.set_index(["station", "variable"])["value"]
    expected = {
        ("10393", "2m_temperature"): 273.1,
        ("11035", "surface_pressure"): 99_000.0,
        ("11035", "mean_sea_level_pressure"): 101_400.0,
        ("11035", "10m_u_component_of_wind"): 4.5,
        ("11035", "10m_v_component_of_wind"): 0.0,
    }
    assert {key: frame[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert found.frame["level_hpa"].isna().all()
    assert str(found.frame["time"][0]) == "2020-01-02 06:00:00"
    assert set(found.frame.set_index("station")["height_m"]["11035"]) == {198.0}


def test_aircraft_report_at_the_pressure_of_their_flight_level(read):
    frame = read(amdar()).frame.set_index("variable")
    assert frame.loc["temperature", "value"] == pytest.approx(228.4)
    assert frame.loc["u_component_of_wind", "value"] == pytest.approx(-31.5)
    assert frame["level_hpa"].unique() == pytest.approx([301.3], abs=0.3)  # 30,000 feet
    assert frame.loc["temperature", "station"] == "EU0123"
    assert str(frame.loc["temperature", "time"]) == "2020-01-02 06:07:00"
    assert set(frame["source"]) == {"aircraft"}


def test_messages_of_several_kinds_lie_in_one_file_with_headings(read):
    found = read(b"IUSD40 EDZW 020000\r\r\n" + temp() + b"\r\r\nNNNN" + synop() + temp(number=394))
    assert (found.reports, set(found.frame["station"])) == (3 + 2 + 3, {"10393", "10394", "11035"})


def test_a_damaged_message_costs_itself_alone(read):
    broken = bytearray(temp(number=500))
    broken[40:-4] = b"\xff" * (len(broken) - 44)
    found = read(temp() + bytes(broken) + temp(number=394))
    assert set(found.frame["station"]) == {"10393", "10394"}
    assert found.note == "1 messages that cannot be decoded"
    found = read(temp() + temp(number=394)[:-30])
    assert (set(found.frame["station"]), found.note) == ({"10393"}, "1 truncated messages")


def test_section_1_is_read_in_both_editions():
    (new,) = split_messages(temp(bufrHeaderCentre=7, localTablesVersionNumber=0))
    handle = eccodes.codes_bufr_new_from_samples("BUFR3")
    for key, value in {
        "bufrHeaderCentre": 7,
        "dataCategory": 2,
        "localTablesVersionNumber": 0,
    }.items():
        eccodes.codes_set(handle, key, value)
    (old,) = split_messages(eccodes.codes_get_message(handle))
    eccodes.codes_release(handle)
    for found in (new, old):
        assert (found.center, found.category, found.local_tables) == (7, 2, 0)


def prepbufr():
    """Sections 0 and 1 of edition 3 as NCEP writes them; its first messages are tables."""
    first = (18).to_bytes(3) + bytes([0, 0, 7, 0, 0, 11, 0, 29, 1, 12, 8, 13, 0, 0, 0])
    rest = (8).to_bytes(3) + bytes(5) + b"7777"
    return b"BUFR" + (8 + len(first) + len(rest)).to_bytes(3) + b"\x03" + first + rest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: temp()[:-30], "truncated BUFR: no message is whole"),
        (
            lambda: b"\0\0\1\0" + prepbufr() + temp(),
            "NCEP prepBUFR.*convert it to IODA NetCDF",
        ),
        (
            lambda: message(309052, 5, {"year": 2020}, factors=[0], extended=[1]),
            "no message could be read: 1 messages of category 5; give",
        ),
    ],
)
def test_what_holds_no_reports_is_refused(read, content, words, refused):
    refused(words, read, content())


def test_the_extra_is_named_where_it_is_missing(read, monkeypatch, refused):
    monkeypatch.setitem(__import__("sys").modules, "pdbufr", None)
    refused(r"bufr needs pdbufr: pip install", read, temp(), error=MissingExtraError)
    with pytest.raises(GatesError, match="prepBUFR"):  # which needs no decoder
        read(prepbufr())


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
    expected = {
        "time": ["2017-01-02 12:00:00", "2017-01-02 12:05:30"],
        "value": [271.25, 249.5],
        "error": [0.75, 1.25],
        "level_hpa": [850.0, 500.0],
        "latitude": [42.5, 42.25],
        "longitude": [-73.75, 286.5],
        "station": ["72518", "72518"],
    }
    temperature = rows(found, "temperature").astype({"time": str})
    assert temperature[list(expected)].to_dict("list") == expected
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


def test_units_are_converted_and_unknown_ones_refused(write, refused):
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
    refused(
        r"airTemperature is in 'degF', expected K; convert it", read_ioda, write(ObsValue=values)
    )


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
    assert (len(found.frame), found.rejected) == (kept, {reason: 3 - kept} if reason else {})


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
    assert (rows(found, "temperature")["value"].tolist(), len(found.frame)) == ([270.0, 230.0], 2)
    assert not found.rejected


def test_damaged_files_are_refused(write, path, refused):
    content = write(
        ObsValue={"airTemperature": (np.array([270.0, 260.0, 230.0]), "K")}
    ).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused("damaged or truncated NetCDF", read_ioda, path)


KELVIN = {"airTemperature": (np.array([270.0, 260.0, 230.0]), "K")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"units": ""}, "dateTime is in '', expected seconds since a date"),
        (
            {"ObsValue": {"airTemperature": (np.ones((3, 4)), "K")}},
            "2 dimensions, expected numbers by location",
        ),
        ({}, "lacks MetaData/latitude"),
    ],
)
def test_a_file_without_epoch_or_place_is_refused(write, changes, words, refused):
    path = write(**{"ObsValue": KELVIN} | changes)
    if not changes:
        with h5py.File(path, "a") as file:
            del file["MetaData/latitude"]
    refused(words, read_ioda, path)
