import numpy as np
import pandas as pd
import pytest

from weather.observations.decoded import Decoded
from weather.observations.report_table import COLUMNS, ObservationTable
from weather.variables import GRAVITY


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


def test_components_win_over_speed_and_direction():
    given = decoded(u=1.0, v=2.0, wind_speed=10.0, wind_direction=270.0)
    assert values(given.canonical()) == {
        "10m_u_component_of_wind": 1.0, "10m_v_component_of_wind": 2.0
    }  # fmt: skip


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
    assert len(given.canonical()) == 0
    assert list(given.rejected) == [reason]


def test_a_calm_needs_no_direction():
    found = values(decoded(wind_speed=0.0).canonical())
    assert found == {"10m_u_component_of_wind": 0.0, "10m_v_component_of_wind": 0.0}


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
