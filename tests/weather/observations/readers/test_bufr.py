"""BUFR messages written by ecCodes from WMO templates: 309052, 307080, 311001."""

import eccodes
import numpy as np
import pytest

from core_gates.errors import GatesError, MissingExtraError
from weather.observations.readers import bufr
from weather.observations.readers.bufr import read_bufr, split_messages
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
        if factors:
            name = "inputDelayedDescriptorReplicationFactor"
            eccodes.codes_set_array(handle, name, list(factors))
        if extended:
            name = "inputExtendedDelayedDescriptorReplicationFactor"
            eccodes.codes_set_array(handle, name, list(extended))
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
    rows = found.frame[found.frame["variable"] == variable]
    return rows.set_index("level_hpa")["value"]


def test_a_sounding_is_exact_to_coded_precision(read):
    found = read(temp())
    assert found.reports == 3
    assert not found.rejected
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
    assert set(rows["station"]) == {"10393"}
    assert set(rows["source"]) == {"radiosonde"}


def test_stations_are_of_the_surface(read):
    found = read(synop())
    assert found.reports == 2
    frame = found.frame.set_index(["station", "variable"])["value"]
    assert frame["10393", "2m_temperature"] == pytest.approx(273.1)
    assert frame["11035", "surface_pressure"] == 99_000.0
    assert frame["11035", "mean_sea_level_pressure"] == 101_400.0
    assert frame["11035", "10m_u_component_of_wind"] == pytest.approx(4.5)
    assert frame["11035", "10m_v_component_of_wind"] == pytest.approx(0.0, abs=1e-9)
    assert found.frame["level_hpa"].isna().all()
    assert str(found.frame["time"][0]) == "2020-01-02 06:00:00"
    height = found.frame.set_index("station")["height_m"]
    assert set(height["11035"]) == {198.0}


def test_aircraft_report_at_the_pressure_of_their_flight_level(read):
    found = read(amdar())
    frame = found.frame.set_index("variable")
    assert frame.loc["temperature", "value"] == pytest.approx(228.4)
    assert frame.loc["u_component_of_wind", "value"] == pytest.approx(-31.5)
    assert frame["level_hpa"].unique() == pytest.approx([301.3], abs=0.3)  # 30,000 feet
    assert frame.loc["temperature", "station"] == "EU0123"
    assert str(frame.loc["temperature", "time"]) == "2020-01-02 06:07:00"
    assert set(frame["source"]) == {"aircraft"}


def test_messages_of_several_kinds_lie_in_one_file_with_headings(read):
    found = read(b"IUSD40 EDZW 020000\r\r\n" + temp() + b"\r\r\nNNNN" + synop() + temp(number=394))
    assert found.reports == 3 + 2 + 3
    assert set(found.frame["station"]) == {"10393", "10394", "11035"}


def test_a_damaged_message_costs_itself_alone(read):
    broken = bytearray(temp(number=500))
    broken[40:-4] = b"\xff" * (len(broken) - 44)
    found = read(temp() + bytes(broken) + temp(number=394))
    assert set(found.frame["station"]) == {"10393", "10394"}
    assert found.note == "1 messages that cannot be decoded"
    found = read(temp() + temp(number=394)[:-30])
    assert set(found.frame["station"]) == {"10393"}
    assert found.note == "1 truncated messages"


def test_nothing_but_a_part_of_a_message_is_refused(read):
    with pytest.raises(GatesError, match="truncated BUFR: no message is whole"):
        read(temp()[:-30])


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
    size = 8 + len(first) + len(rest)
    return b"BUFR" + size.to_bytes(3) + b"\x03" + first + rest


def test_prepbufr_is_refused_with_advice(read):
    with pytest.raises(GatesError, match=r"NCEP prepBUFR.*convert it to IODA NetCDF"):
        read(b"\0\0\1\0" + prepbufr() + temp())


def test_messages_of_satellites_are_refused(read):
    other = message(309052, 5, {"year": 2020}, factors=[0], extended=[1])
    with pytest.raises(
        GatesError, match=r"no message could be read: 1 messages of category 5; give"
    ):
        read(other)


def test_the_extra_is_named_where_it_is_missing(read, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pdbufr", None)
    with pytest.raises(MissingExtraError, match=r"bufr needs pdbufr: pip install"):
        read(temp())
    with pytest.raises(GatesError, match="prepBUFR"):  # which needs no decoder
        read(prepbufr())


def test_the_advice_is_one_line():
    assert "\n" not in bufr.ADVICE
