"""Tables of reports in the plain format and of METAR."""

import numpy as np
import pandas as pd
import pytest

from weather.observations.decoded import read_lines
from weather.observations.readers.formats import read_csv_table, read_parquet_table
from weather.observations.readers.metar import (
    decode,
    is_metar_line,
    read_metar_parquet,
    read_metar_text,
)


def plain_table(**columns):
    frame = {
        "time": "2017-01-02T12:00", "latitude": [50.0, 51.0], "longitude": 8.0,
        "level_hpa": [850.0, np.nan], "variable": ["temperature", "2m_temperature"],
        "value": [270.0, 280.0], "error": [1.0, 2.0], "station": "A",
    }  # fmt: skip
    return pd.DataFrame(frame | columns)


@pytest.fixture
def read_plain(tmp_path):
    def read_plain(frame):
        csv, parquet = tmp_path / "t.csv", tmp_path / "t.parquet"
        frame.to_csv(csv, index=False)
        frame.to_parquet(parquet)
        first, second = read_csv_table(csv), read_parquet_table(parquet)
        assert (first.rejected, len(first.frame)) == (second.rejected, len(second.frame))
        return first

    return read_plain


def test_missing_errors_are_those_of_the_variable_in_its_unit(read_plain):
    assert read_plain(plain_table().drop(columns="error")).frame["error"].tolist() == [1.5, 1.5]
    assert read_plain(plain_table(error=[np.nan, 3.0])).frame["error"].tolist() == [1.5, 3.0]
    heights = plain_table(variable="geopotential", level_hpa=500.0, value=5500.0, units="gpm")
    found = read_plain(heights.drop(columns="error")).frame["error"]
    assert found.tolist() == pytest.approx([82 / 9.80665] * 2)


def test_flagged_and_textual_rows_are_rejected(read_plain):
    found = read_plain(plain_table(qc=[3, 0]))
    assert (len(found.frame), found.rejected) == (1, {"flagged in the file": 1})
    found = read_plain(plain_table(value=["cold", "280.0"]))
    assert found.frame["value"].tolist() == [280.0]
    assert found.rejected == {"text in place of a number": 1}


def test_other_columns_are_named(tmp_path, refused):
    path = tmp_path / "t.csv"
    path.write_text("when,where\n1,2\n")
    refused(r"lacks the column time, latitude, .*, found when, where", read_csv_table, path)
    path.write_text('a,b\n"1\n')
    refused("unreadable CSV", read_csv_table, path)


KNOT = 0.514444


@pytest.mark.fault("46 neighbors")
def test_reports_in_another_encoding_are_refused(tmp_path, refused):
    (tmp_path / "t.txt").write_bytes("METAR EDDB\nRMK Böen\n".encode("latin-1"))
    refused(r"t.txt, line 2: byte 6 is not UTF-8", read_lines, tmp_path / "t.txt")


def test_a_report_is_decoded_by_the_code():
    found = decode(
        "METAR KALB 280651Z 29014G24KT 10SM OVC021 M01/M05 A3008 RMK AO2 PK WND 29029/0620 "
        "PRESRR SLP188 T10111050"
    )
    assert found == pytest.approx(
        {
            "wind_speed": 14 * KNOT,
            "wind_direction": 290.0,
            "temperature": 272.05,
            "dewpoint": 268.15,
            "altimeter": 30.08 * 3386.389,
            "sea_level_pressure": 101_880.0,
        }
    )


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("METAR EDDF 010020Z 22015MPS 9999 10/M02 Q1013 NOSIG", {
            "wind_speed": 15.0, "wind_direction": 220.0, "temperature": 283.15,
            "dewpoint": 271.15, "altimeter": 101_300.0}),
        ("SPECI KSNC 280755Z AUTO 27005KT 5SM HZ 07/ A2991 RMK A02 SLP998", {
            "wind_speed": 5 * KNOT, "wind_direction": 270.0, "temperature": 280.15,
            "altimeter": 2991 * 33.86389, "sea_level_pressure": 99_980.0}),
        ("METAR KHFJ 280515Z AUTO 00000KT 10SM RMK AO1 T0006", {
            "wind_speed": 0.0, "wind_direction": 0.0, "temperature": 273.75}),
        ("METAR KXXX 280515Z ///// NIL", {}),
    ],
)  # fmt: skip
def test_units_and_missing_groups(report, expected):
    assert decode(report) == pytest.approx(expected)


def test_a_variable_wind_has_no_direction():
    found = decode("METAR KALB 280654Z VRB05G17KT 10SM M01/M03 A2995")
    assert np.isnan(found["wind_direction"])
    assert found["wind_speed"] == pytest.approx(5 * KNOT)


def test_real_text_agrees_with_its_decoded_columns(real):
    path = real / "2009022800_metar.txt"
    lines = path.read_text().splitlines()
    assert all(map(is_metar_line, lines))
    found = read_metar_text(path)
    assert found.reports == 314
    frame = found.frame.drop_duplicates(["time", "station", "variable"], keep="first")
    by_report = frame.set_index(["station", "time", "variable"])["value"]
    compared = 0
    for line in lines:
        words = line.split()
        station, time = words[6], pd.Timestamp(int(words[9]), unit="s")
        temperature, direction, knots, sea = words[12], words[14], words[15], words[19]
        if temperature != "None":
            value = by_report[station, time, "2m_temperature"]
            assert value == pytest.approx(273.15 + int(temperature) / 10, abs=0.51)
        if knots not in ("None", "0") and direction not in ("None", "0"):
            u, v = (by_report[station, time, f"10m_{c}_component_of_wind"] for c in "uv")
            assert np.hypot(u, v) == pytest.approx(int(knots) * KNOT, abs=1e-9)
            turned = np.rad2deg(np.arctan2(-u, -v)) - int(direction)
            assert (turned + 180) % 360 - 180 == pytest.approx(0, abs=1e-9)
            compared += 1
        if sea != "None":
            value = by_report[station, time, "mean_sea_level_pressure"]
            assert value == pytest.approx(10.0 * int(sea), abs=1e-6)
    assert compared > 200


def test_other_lines_are_counted(tmp_path, real, refused):
    path = tmp_path / "metar.txt"
    lines = (real / "2009022800_metar.txt").read_text().splitlines()[:2]
    path.write_text("\n".join([lines[0], "001 KSGF 37.23 -93.38", lines[1][:60]]))
    found = read_metar_text(path)
    assert (found.reports, found.rejected["lines of another layout"]) == (1, 2)
    path.write_text("nothing\n")
    refused("no line holds a decoded METAR", read_metar_text, path)


def table(**columns):
    """Two reports of one station, changed by column."""
    frame = {
        "stationName": "EDDF", "latitude": np.float32(50.0), "longitude": np.float32(8.5),
        "elevation": [100.0, 9999.0], "timeObs": pd.to_datetime(["2020-01-01T11:50"] * 2),
        "timeNominal": pd.to_datetime(["2020-01-01T12:00"] * 2),
        "temperature": [280.0, 281.0], "temperatureDD": ["V", "V"],
        "dewpoint": [275.0, np.nan], "dewpointDD": ["S", "Z"],
        "windDir": [180.0, np.nan], "windDirDD": ["V", "Z"],
        "windSpeed": [10.0, 0.0], "windSpeedDD": ["V", "V"],
        "altimeter": [101_325.0, 101_325.0], "altimeterDD": ["V", "V"],
        "seaLevelPress": [np.nan, 101_500.0], "seaLevelPressDD": ["Z", "V"],
    }  # fmt: skip
    return pd.DataFrame(frame | columns)


@pytest.fixture
def read(tmp_path):
    def read(**columns):
        path = tmp_path / "metar.parquet"
        table(**columns).to_parquet(path)
        return read_metar_parquet(path)

    return read


def values(found, variable):
    return found.frame.loc[found.frame["variable"] == variable, "value"].tolist()


def test_values_are_converted(read):
    found = read()
    assert (found.reports, values(found, "2m_temperature")) == (2, [280.0, 281.0])
    assert values(found, "10m_v_component_of_wind") == pytest.approx([10.0, 0.0])
    # The standard atmosphere has 1001.29 hPa at 100 m; the second station has no elevation.
    assert values(found, "surface_pressure") == pytest.approx([100_129.0], abs=3)
    (humidity,) = values(found, "specific_humidity")
    assert humidity == pytest.approx(0.622 * 698.5 / (100_129 - 0.378 * 698.5), rel=2e-3)
    reduced, reported = values(found, "mean_sea_level_pressure")
    assert reported == 101_500.0
    assert reduced == pytest.approx(101_325 + 35, abs=15)  # colder than the standard by 7.5 K
    assert set(found.frame["time"].astype(str)) == {"2020-01-01 11:50:00"}
    assert set(found.frame["source"]) == {"metar"}


def test_pressure_is_not_reduced_from_500_m_upwards(read):
    found = read(elevation=[499.0, 501.0], seaLevelPress=np.nan)
    assert len(values(found, "mean_sea_level_pressure")) == 1
    assert len(values(found, "surface_pressure")) == 2


@pytest.mark.parametrize("flag", ["Z", "B", "X", "Q", "k"])
def test_flags_of_madis_reject(flag, read):
    found = read(temperatureDD=["V", flag])
    assert (values(found, "2m_temperature"), found.rejected["flagged by MADIS"]) == ([280.0], 1)


def test_a_dewpoint_above_the_temperature_is_rejected(read):
    found = read(dewpoint=[280.9, np.nan])
    assert not values(found, "specific_humidity")
    assert found.rejected["dewpoint above temperature"] == 1


def test_the_real_month_has_the_counts_of_its_readme(real):
    found = read_metar_parquet(real / "metar_2020-01.parquet")
    source = pd.read_parquet(real / "metar_2020-01.parquet")
    assert (found.reports, found.frame["station"].nunique()) == (12_549, 12)
    good = ~source["temperatureDD"].isin(list("ZBXQk"))
    assert len(values(found, "2m_temperature")) == good.sum() == 12_496
    np.testing.assert_allclose(values(found, "2m_temperature"), source["temperature"][good])
    assert found.frame["variable"].value_counts()["10m_u_component_of_wind"] > 11_000


def test_damaged_and_incomplete_tables_are_refused(tmp_path, refused):
    path = tmp_path / "metar.parquet"
    table().drop(columns=["latitude", "elevation"]).to_parquet(path)
    refused("METAR table lacks the column latitude, elevation; add it", read_metar_parquet, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused("damaged or truncated Parquet", read_metar_parquet, path)
