"""Tables of reports: their checks, usual errors, and decoded files."""

import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from weather.observations.decoded import Decoded
from weather.observations.readers.formats import read_csv_table
from weather.observations.report_table import (
    COLUMNS,
    OUT_OF_RANGE,
    ObservationTable,
    observation_error,
)
from weather.variables import GRAVITY


def reports(**columns):
    """Five sound reports, changed by column."""
    frame = pd.DataFrame(
        {
            "time": pd.date_range("2020-01-01", periods=5, freq="h"),
            "latitude": [-90.0, -45.0, 0.0, 45.0, 90.0],
            "longitude": [-180.0, -90.0, 0.0, 180.0, 360.0],
            "variable": "temperature",
            "value": [230.0, 270.0, 300.0, 280.0, 250.0],
            "error": 1.0,
            "level_hpa": 850.0,
        }
    )
    return frame.assign(**columns)


def test_columns_are_completed_and_typed():
    frame = ObservationTable.from_frame(reports(extra=1)).frame
    assert list(frame.columns) == list(COLUMNS)
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == dict(COLUMNS)
    assert frame["height_m"].isna().all()
    assert (frame["qc"] == 0).all()
    assert (frame["station"] == "").all()


def test_longitudes_run_from_0_to_360():
    frame = ObservationTable.from_frame(reports()).frame
    assert frame["longitude"].tolist() == [180, 270, 0, 180, 0]


@pytest.mark.parametrize(
    "times",
    [
        [f"2020-01-01T0{hour}:00" for hour in range(5)],
        pd.date_range("2020-01-01T02:00", periods=5, freq="h", tz="Europe/Athens"),
        pd.date_range("2020-01-01", periods=5, freq="h").to_numpy().astype("datetime64[s]"),
    ],
)
def test_times_become_utc(times):
    expected = pd.date_range("2020-01-01", periods=5, freq="h").to_numpy("datetime64[ns]")
    frame = ObservationTable.from_frame(reports(time=times)).frame
    np.testing.assert_array_equal(frame["time"].to_numpy(), expected)


def test_names_are_text():
    frame = ObservationTable.from_frame(reports(station=[1, 2, 3, np.nan, 5], source=None)).frame
    assert frame["station"].tolist() == ["1.0", "2.0", "3.0", "", "5.0"]
    assert frame["source"].tolist() == [""] * 5


FAULTS = {
    "no variable": (reports().drop(columns=["variable", "error"]), "lack the column variable, err"),
    "unknown variable": (
        reports(variable="temprature"),
        "temprature is unknown; did you mean temp",
    ),
    "strange variable": (reports(variable="xyz"), "xyz is unknown; use one of .*temperature"),
    "NaT": (
        reports(time=[pd.NaT, *reports()["time"][1:]]),
        "1 of 5 observations have a bad time, the first is NaT in row 0.*drop rows without",
    ),
    "no date": (
        reports(time="yesterday at noon"),
        "5 of 5 .* have an unreadable time, .*; write it as",
    ),
    "latitude": (
        reports(latitude=[0, 0, 91, 0, 0]),
        "bad latitude, the first is 91.0 in row 2, expected degrees from -90 to 90; correct or",
    ),
    "longitude": (
        reports(longitude=[0, -181, 0, 361, 0]),
        "2 of 5 observations have a bad longitude, the first is -181.0 in row 1.*-180 to 360",
    ),
    "NaN longitude": (reports(longitude=np.nan), "5 of 5 observations have a bad longitude"),
    "text": (reports(value="warm"), "value holds .*, expected float64 .*convert it"),
    "NaN value": (reports(value=[np.nan, 1, 1, 1, 1]), "bad value, the first is nan.*drop the row"),
    "zero error": (
        reports(error=0.0),
        "bad error, the first is 0.0.*positive standard dev.*set it",
    ),
    "infinite error": (reports(error=np.inf), "bad error, the first is inf"),
    "level in Pa": (reports(level_hpa=85_000.0), "looks like Pa: divide by 100"),
    "negative level": (reports(level_hpa=-1.0), "expected a positive pressure"),
    "celsius": (
        reports(value=[-40.0, 0.0, 27.0, 7.0, -23.0]),
        "temperature is mostly .*150 to 350 K; it looks like degrees Celsius: add 273.15",
    ),
    "hectopascal": (
        reports(variable="surface_pressure", value=[700.0, 980, 1010, 1020, 1000]),
        "expected 40000 to 115000 Pa; it looks like hPa: multiply by 100",
    ),
    "gram per kilogram": (
        reports(variable="specific_humidity", value=[1.0, 3, 12, 4, 0.2]),
        "it looks like g/kg: divide by 1000",
    ),
    "wind": (
        reports(variable="u_component_of_wind", value=[0.0, 0, 151, 0, 0]),
        "first is 151.0 in row 2, expected -150 to 150 m s-1 for u_component_of_wind; correct or",
    ),
    "a year before nanoseconds": (
        reports(time=["2020-01-01", "0001-01-01", *["2020-01-01"] * 3]),
        "1 of 5 .* bad time, .*0001-01-01.* in row 1, .*1678",
    ),
    "a year after nanoseconds": (
        reports(time=["2020-01-01", "3000-01-01", *["2020-01-01"] * 3]),
        "1 of 5 .* bad time, .*3000-01-01.* in row 1, .*1678",
    ),
    "unknown unit": (
        reports(units=["degF", None, None, None, None]),
        "temperature is in units 'degF', expected one of K, deg",
    ),
    "one value": (
        reports(value=[230.0, 270.0, 1e6, 280.0, 250.0]),
        "1 of 5 observations have a bad value, the first is 1000000.0 in row 2, expected 150",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    frame, words = FAULTS[fault]
    with pytest.raises(GatesError, match=words) as caught:
        ObservationTable.from_frame(frame)
    assert "\n" not in str(caught.value)


def test_celsius_is_recognized_beside_outliers(refused):
    values = np.append(np.linspace(-30, 30, 99), 1e6)
    frame = pd.concat([reports()] * 20, ignore_index=True).assign(value=values)
    refused(
        "looks like degrees Celsius", ObservationTable.from_frame, frame, flag_out_of_range=True
    )


def test_out_of_range_values_are_flagged_on_request():
    frame = reports(value=[230.0, 270.0, 1e6, 280.0, 20.0], qc=[0, 5, 0, 0, 3])
    flagged = ObservationTable.from_frame(frame, flag_out_of_range=True).frame
    assert flagged["qc"].tolist() == [0, 5, OUT_OF_RANGE, 0, 3]


@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_files_round_trip(name, tmp_path):
    table = ObservationTable.from_frame(reports(station=["a", "b", "c", "d", "e"], source="x"))
    path = table.write(tmp_path / name)
    pd.testing.assert_frame_equal(ObservationTable.read(path).frame, table.frame)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_bad_files_are_named(tmp_path, refused):
    refused(
        r"nowhere.csv does not exist; check the path",
        ObservationTable.read,
        tmp_path / "nowhere.csv",
    )
    garbage = tmp_path / "table.parquet"
    garbage.write_bytes(b"no parquet")
    refused(r"table.parquet cannot be read as a table .*convert it", ObservationTable.read, garbage)
    reports(latitude=100.0).to_csv(tmp_path / "bad.csv")
    refused(
        r"bad.csv: 5 of 5 observations have a bad latitude",
        ObservationTable.read,
        tmp_path / "bad.csv",
    )


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("read", [ObservationTable.read, read_csv_table])
def test_cells_that_would_be_lost_are_refused(read, tmp_path, refused):
    reports().to_csv(path := tmp_path / "t.csv", index=False)
    good = path.read_text()
    path.write_text(good.replace("\n", ",\n").replace(",\n", "\n", 1))
    refused(r"line 2: it has 8 cells, expected 7 .*no comma at the end", read, path)
    path.write_text(good.replace("value", "value,value", 1))
    refused("two columns named 'value'", read, path)


@pytest.mark.fault("46 neighbors")
def test_a_time_that_is_a_number_is_shown_as_it_is(refused):
    refused(
        r"the first is '52.5' in row 0", ObservationTable.from_frame, reports(time=np.full(5, 52.5))
    )


@pytest.mark.fault("46 neighbors")
def test_a_column_unit_is_not_taken_for_none(refused):
    refused(r"a column unit; did you mean units\?", ObservationTable.from_frame, reports(unit="K"))


def test_the_suffix_decides_and_others_are_refused(tmp_path, refused):
    table = ObservationTable.from_frame(reports())
    assert table.write(tmp_path / "table.CSV").read_text().startswith("time,")
    assert len(ObservationTable.read(tmp_path / "table.CSV")) == 5
    assert table.write(tmp_path / "table.Parquet").read_bytes()[:4] == b"PAR1"
    for name in ("table.txt", "table"):
        refused(rf"{name} ends in .*, expected \.parquet or \.csv", table.write, tmp_path / name)
        assert not (tmp_path / name).exists()
        (tmp_path / name).touch()
        refused("rename or convert it", ObservationTable.read, tmp_path / name)


def upper(variable, values, levels, **columns):
    rows = {"level_hpa": levels, "value": values} | columns
    return pd.DataFrame(rows).assign(
        time="2017-01-02T12:00", latitude=10.0, longitude=20.0, variable=variable, error=10.0
    )


@pytest.mark.fault("weather Ba")
@pytest.mark.parametrize(
    ("unit", "size", "factor"), [("gpm", 1.0, 9.80665), ("gpdam", 10, 98.0665)]
)
def test_geopotential_in_another_unit_is_refused_with_the_unit(unit, size, factor, refused):
    heights = np.array([5500.0, 1480.0, 5600.0]) / size
    table = upper("geopotential", heights, [500.0, 850.0, 500.0])
    message = rf"it looks like {unit}: add a column units with {unit}, .* by {factor:.6g}"
    for flag in (False, True):
        refused(message, ObservationTable.from_frame, table, flag_out_of_range=flag)
    found = ObservationTable.from_frame(table.assign(units=unit)).frame
    assert np.allclose(found["value"], heights * factor)
    assert np.allclose(found["error"], 10 * factor)
    right = ObservationTable.from_frame(table.assign(value=heights * factor)).frame
    assert np.allclose(right["error"], 10)


@pytest.mark.fault("weather Ba")
@pytest.mark.parametrize(
    ("variable", "value", "unit", "expected", "error"),
    [
        ("temperature", -12.5, "degC", 260.65, 10.0),
        ("temperature", 260.65, "K", 260.65, 10.0),
        ("temperature", 260.65, "", 260.65, 10.0),
        ("mean_sea_level_pressure", 1013.0, "hPa", 101300.0, 1000.0),
        ("u_component_of_wind", 36.0, "km/h", 10.0, 10 / 3.6),
        ("u_component_of_wind", 10.0, "m/s", 10.0, 10.0),
        ("specific_humidity", 5.0, "g/kg", 0.005, 0.01),
        ("geopotential", 50_000.0, "m² s⁻²", 50_000.0, 10.0),
    ],
)
def test_a_column_of_units_converts_values_and_errors(variable, value, unit, expected, error):
    table = upper(variable, [value], [500.0], units=[unit])
    found = ObservationTable.from_frame(table).frame.iloc[0]
    assert (found["value"], found["error"]) == (pytest.approx(expected), pytest.approx(error))


@pytest.mark.fault("weather Bf")
def test_a_time_that_is_no_date_is_named_in_our_words():
    table = upper("temperature", [260.0, 261.0], [500.0, 500.0])
    table["time"] = ["2017-01-02T12:00", "noon on Monday"]
    with pytest.raises(GatesError) as caught:
        ObservationTable.from_frame(table)
    assert str(caught.value) == (
        "1 of 2 observations have an unreadable time, the first is 'noon on Monday' in row 1; "
        "write it as 2017-01-01T00:00"
    )


LEVELS = np.array([1000.0, 850.0, 500.0, 250.0, 10.0])


def test_errors_are_those_of_the_levels_and_linear_in_the_logarithm_of_pressure():
    assert observation_error("temperature", LEVELS).tolist() == [1.7, 1.5, 1.2, 1.5, 2.5]
    middle = observation_error("temperature", np.array([np.sqrt(850 * 700)]))
    assert middle == pytest.approx([1.4])
    assert observation_error("temperature", np.array([1050.0, 5.0])).tolist() == [1.7, 2.5]
    both = [observation_error(f"{name}_component_of_wind", LEVELS) for name in "uv"]
    assert np.array_equal(*both)


def test_surface_reports_have_one_error():
    assert observation_error("2m_temperature", np.array([np.nan] * 2)).tolist() == [1.5, 1.5]
    assert observation_error("mean_sea_level_pressure", np.array([np.nan])) == 100.0
    assert np.isnan(observation_error("total_precipitation", LEVELS)).all()


def test_the_error_of_humidity_is_a_fraction_of_saturation():
    warm, cold = observation_error(
        "specific_humidity", np.array([1000.0, 1000.0]), np.array([293.15, 253.15])
    )
    assert warm == pytest.approx(0.15 * 0.01468, rel=1e-3)
    assert cold == pytest.approx(0.15 * 0.000782, rel=5e-3)
    assert 0 < observation_error("specific_humidity", np.array([5.0]), np.array([400.0])) < 1


def decoded(**columns):
    place = {"time": pd.Timestamp("2020-01-01T12:00"), "latitude": 50.0, "longitude": 8.0,
             "station": "A"}  # fmt: skip
    count = max((len(v) for v in columns.values() if isinstance(v, list)), default=1)
    return Decoded("test", pd.DataFrame(place | columns, index=range(count)))


def values(frame):
    return frame.set_index("variable")["value"].to_dict()


def test_the_result_is_a_sound_table():
    frame = decoded(temperature=[280.0, 250.0], level_hpa=[np.nan, 500.0]).canonical()
    table = ObservationTable.from_frame(frame)
    assert set(frame) <= set(COLUMNS)
    assert table.frame["variable"].tolist() == ["temperature", "2m_temperature"]
    assert len(decoded().canonical()) == 0
    assert "time" in decoded().canonical()


@pytest.mark.parametrize(
    ("columns", "u", "v"),
    [
        ({"u": 1.0, "v": 2.0, "wind_speed": 10.0, "wind_direction": 270.0}, 1.0, 2.0),
        ({"wind_speed": 0.0}, 0.0, 0.0),  # a calm needs no direction
    ],
)
def test_components_win_over_speed_and_direction(columns, u, v):
    found = values(decoded(**columns).canonical())
    assert found == {"10m_u_component_of_wind": u, "10m_v_component_of_wind": v}


@pytest.mark.parametrize(
    ("speed", "direction", "reason"),
    [
        (-1.0, 90.0, "impossible wind"),
        (5.0, 361.0, "impossible wind"),
        (5.0, np.nan, "wind without direction or speed"),
        (np.nan, 90.0, "wind without direction or speed"),
    ],
)
def test_winds_that_are_none_are_rejected(speed, direction, reason):
    given = decoded(wind_speed=speed, wind_direction=direction)
    assert (len(given.canonical()), list(given.rejected)) == (0, [reason])


def test_humidity_without_pressure_or_temperature_is_rejected():
    for columns in ({"dewpoint": 270.0}, {"relative_humidity": 0.5, "level_hpa": 850.0}):
        given = decoded(**columns)
        assert len(given.canonical()) == 0
        assert given.rejected == {"humidity without pressure or temperature": 1}
    given = decoded(relative_humidity=1.5, temperature=280.0, level_hpa=850.0)
    given.canonical()
    assert given.rejected == {"impossible humidity": 1}


def test_dewpoint_wins_over_relative_humidity_and_counts_once():
    given = decoded(dewpoint=275.0, relative_humidity=0.1, temperature=280.0, level_hpa=200.0)
    given.canonical()
    assert given.rejected == {"humidity above 300 hPa": 1}


def test_stated_errors_are_kept_and_others_completed():
    given = decoded(
        temperature=[280.0, 281.0], level_hpa=850.0, error_temperature=[0.25, np.nan],
        height=[1500.0, 1500.0], error_height=[2.0, -1.0],
    )  # fmt: skip
    frame = given.canonical()
    assert frame.loc[frame["variable"] == "temperature", "error"].tolist() == [0.25, 1.5]
    geopotential = frame.loc[frame["variable"] == "geopotential", "error"].tolist()
    assert geopotential == pytest.approx([2 * GRAVITY, 43.0])


def test_heights_are_those_of_levels_and_stations():
    frame = decoded(
        temperature=[280.0, 250.0], level_hpa=[np.nan, 500.0], height=[np.nan, 5500.0],
        elevation_m=120.0,
    ).canonical()  # fmt: skip
    height = frame.set_index("variable")["height_m"]
    assert height["2m_temperature"] == 120.0
    assert height["temperature"] == height["geopotential"] == 5500.0


def test_soundings_are_checked_one_by_one():
    pressure, height = [850.0, 700.0, 500.0], [1457.0, 3012.0, 5574.0]
    warm = [283.0, 272.0, 253.0]
    good = {"level_hpa": pressure * 2, "temperature": warm * 2, "height": height * 2}
    assert not (given := decoded(sounding=[0.0] * 3 + [1.0] * 3, **good)).canonical().empty
    assert not given.rejected
    wrong = good | {"height": [*height, 1457.0, 2012.0, 5574.0]}
    given = decoded(sounding=[0.0] * 3 + [1.0] * 3, **wrong)
    given.canonical()
    assert given.rejected == {"hydrostatic check": 1}


def test_temperatures_in_a_wrong_unit_are_left_to_the_check_of_ranges():
    given = decoded(level_hpa=[850.0, 500.0], temperature=[10.0, -20.0], height=[1457.0, 5574.0],
                    sounding=0.0)  # fmt: skip
    assert len(given.canonical()) == 4
    assert not given.rejected
