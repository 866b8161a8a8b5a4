import os
from pathlib import Path

import numpy as np
import pytest

from core_gates.errors import GatesError
from weather.observations.conversions import DRY_AIR
from weather.observations.readers.soundings import is_sonde_line, read_sonde_text
from weather.variables import GRAVITY

ROOT = Path(__file__).parents[4]
DATA = Path(os.environ.get("GATES_SHARED", ROOT.parent / "shared")) / "data" / "weather"
LEVELS = {"001_KSGF": 100, "002_KBUF": 100, "003_KALB": 78, "006_KOKX": 86}


@pytest.fixture
def real():
    if not DATA.exists():
        pytest.skip("the real files are not on this machine")
    return DATA


def level(pressure=850.0, **changes):
    """A line of the 21 columns; 999 and 99 are missing."""
    columns = {
        "record": 1.0, "pressure": pressure, "temperature": 6.0, "dewpoint": -11.0,
        "humidity": 28.3, "u": -6.6, "v": 1.2, "speed": 6.7, "direction": 100.0, "ascent": 99.0,
        "longitude": -93.4,
        "latitude": 37.2, "range": 999.0, "angle": 999.0, "altitude": 1453.0, "flag_p": 99.0,
        "flag_t": 99.0, "flag_rh": 99.0, "flag_u": 99.0, "flag_v": 99.0, "flag_w": 99.0,
    }  # fmt: skip
    return " ".join(f"{value}" for value in (columns | changes).values())


@pytest.fixture
def read(tmp_path):
    def read(*lines, name="2009022800_001_KSGF_raob.txt"):
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return read_sonde_text(path)

    return read


def test_values_are_converted(read):
    frame = read(level()).frame.set_index("variable")
    assert frame.loc["temperature", "value"] == pytest.approx(279.15)
    assert frame.loc["geopotential", "value"] == pytest.approx(1453 * GRAVITY)
    assert frame.loc["u_component_of_wind", "value"] == -6.6
    assert frame.loc["v_component_of_wind", "value"] == 1.2
    # 264.3 Pa is the saturation pressure over water at -11 deg C (Sonntag 1990).
    expected = 0.622 * 264.3 / (85_000 - 0.378 * 264.3)
    assert frame.loc["specific_humidity", "value"] == pytest.approx(expected, rel=2e-3)
    assert set(frame["level_hpa"]) == {850.0}
    assert set(frame["station"]) == {"KSGF"}
    assert set(frame["longitude"]) == {-93.4}
    assert set(frame["time"].astype(str)) == {"2009-02-28"}


def test_wind_comes_from_speed_and_direction_where_components_are_missing(read):
    frame = read(level(u=999.0, v=999.0, speed=10.0, direction=270.0)).frame.set_index("variable")
    assert frame.loc["u_component_of_wind", "value"] == pytest.approx(10.0)
    assert frame.loc["v_component_of_wind", "value"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"flag_t": 3.0}, {"temperature"}),
        ({"flag_rh": 2.0}, {"specific_humidity"}),
        ({"flag_u": 3.0}, {"u_component_of_wind", "v_component_of_wind"}),
        ({"flag_t": 1.0, "flag_rh": 4.0, "flag_u": 9.0}, set()),
        ({"flag_p": 3.0}, {"temperature", "specific_humidity", "geopotential",
                           "u_component_of_wind", "v_component_of_wind"}),
    ],
)  # fmt: skip
def test_flags_reject(changes, lost, read):
    every = {"temperature", "specific_humidity", "geopotential", "u_component_of_wind",
             "v_component_of_wind"}  # fmt: skip
    frame = read(level(**changes)).frame
    found = set(frame["variable"]) if len(frame) else set()
    assert every - found == lost


def test_heights_below_the_ground_are_rejected(read):
    below = level(1000.0, temperature=999.0, dewpoint=999.0, humidity=999.0, u=999.0, v=999.0,
                  speed=999.0, direction=999.0, altitude=146.0)  # fmt: skip
    found = read(below, level())
    assert set(found.frame["level_hpa"]) == {850.0}
    assert found.rejected == {"height below the ground": 1}


def test_a_pressure_of_999_hpa_and_a_height_of_999_m_are_sound(read):
    assert set(read(level(999.0, altitude=100.0)).frame["level_hpa"]) == {999.0}
    for pressure, sound in ((900.0, True), (300.0, False)):
        found = read(level(pressure, altitude=999.0)).frame
        assert ("geopotential" in set(found["variable"])) is sound


@pytest.mark.parametrize("site", LEVELS)
def test_real_soundings_have_their_levels_and_are_hydrostatic(site, real):
    found = read_sonde_text(real / f"2009022800_{site}_raob.txt")
    assert found.reports == LEVELS[site]
    assert "hydrostatic check" not in found.rejected
    frame = found.frame
    profiles = {
        name: rows.set_index("level_hpa")["value"] for name, rows in frame.groupby("variable")
    }
    reported = profiles["geopotential"][500.0] - profiles["geopotential"][850.0]
    dry = profiles["temperature"]
    humidity = profiles["specific_humidity"].reindex(dry.index).fillna(0)
    layer = (dry * (1 + 0.61 * humidity)).loc[lambda t: t.index.to_series().between(500, 850)]
    logarithm = -np.log(layer.index.to_numpy())
    hydrostatic = DRY_AIR * np.trapezoid(layer.to_numpy(), logarithm)
    assert hydrostatic == pytest.approx(reported, rel=0.01)


def test_names_and_lines_that_are_not_those_of_a_sounding(read):
    with pytest.raises(GatesError, match=r"its name holds no date and station.*rename it"):
        read(level(), name="sounding.txt")
    with pytest.raises(GatesError, match="2009133800 in its name is no date"):
        read(level(), name="2009133800_001_KSGF_raob.txt")
    found = read(level(), level()[:40])
    assert found.reports == 1
    assert found.rejected["partially written lines"] == 1
    assert not is_sonde_line(level().replace("850.0", "nan"))
