"""Radiosondes: IGRA and text files."""

import zipfile

import numpy as np
import pytest

from core_gates.errors import GatesError
from weather.observations.conversions import DRY_AIR
from weather.observations.readers.soundings import (
    is_igra_line,
    is_sonde_line,
    read_igra,
    read_sonde_text,
)
from weather.observations.report_table import Period
from weather.variables import GRAVITY

HEADER = {
    "HEADREC": (1, 1), "ID": (2, 12), "YEAR": (14, 17), "MONTH": (19, 20), "DAY": (22, 23),
    "HOUR": (25, 26), "RELTIME": (28, 31), "NUMLEV": (33, 36), "P_SRC": (38, 45),
    "NP_SRC": (47, 54), "LAT": (56, 62), "LON": (64, 71),
}  # fmt: skip
LEVEL = {
    "LVLTYP1": (1, 1), "LVLTYP2": (2, 2), "ETIME": (4, 8), "PRESS": (10, 15), "PFLAG": (16, 16),
    "GPH": (17, 21), "ZFLAG": (22, 22), "TEMP": (23, 27), "TFLAG": (28, 28), "RH": (29, 33),
    "DPDP": (35, 39), "WDIR": (41, 45), "WSPD": (47, 51),
}  # fmt: skip


def line(columns, values):
    """Numbers stand at the right end of their columns, as Fortran writes them."""
    text = [" "] * max(last for _, last in columns.values())
    for name, value in values.items():
        first, last = columns[name]
        width = last - first + 1
        field = str(value).rjust(width)
        assert len(field) == width, name
        text[first - 1 : last] = field
    return "".join(text)


def header(**changes):
    values = {
        "HEADREC": "#", "ID": "USM00072518", "YEAR": 2017, "MONTH": "01", "DAY": "02",
        "HOUR": "12", "RELTIME": 1104, "NUMLEV": 3, "P_SRC": "ncdc-gts", "NP_SRC": "ncdc-gts",
        "LAT": 426917, "LON": -738317,
    }  # fmt: skip
    return line(HEADER, values | changes)


def level(**changes):
    values = {
        "LVLTYP1": 1, "LVLTYP2": 0, "ETIME": -9999, "PRESS": -9999, "GPH": -9999, "TEMP": -9999,
        "RH": -9999, "DPDP": -9999, "WDIR": -9999, "WSPD": -9999,
    }  # fmt: skip
    return line(LEVEL, values | changes)


SOUNDING = [
    header(),
    level(LVLTYP1=2, LVLTYP2=1, ETIME=0, PRESS=99500, PFLAG="B", GPH=92, ZFLAG="B", TEMP=-13,
          TFLAG="B", RH=721, DPDP=44, WDIR=310, WSPD=51),
    level(ETIME=422, PRESS=85000, GPH=1324, ZFLAG="A", TEMP=-105, DPDP=100, WDIR=280, WSPD=123),
    level(ETIME=1630, PRESS=50000, GPH=5252, TEMP=-300, WDIR=265, WSPD=307),
]  # fmt: skip


@pytest.fixture
def read(tmp_path):
    def read(*lines, period=None):
        path = tmp_path / "USM00072518-data.txt"
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
        return read_igra(path, period or Period())

    return read


def values(found, variable):
    return found.frame[found.frame["variable"] == variable].set_index("level_hpa")["value"]


def test_the_header_of_a_sounding_is_known():
    comment = "# a comment of a text file that is as long as the header of a sounding"
    assert list(map(is_igra_line, (header(), SOUNDING[1], comment))) == [True, False, False]


def test_values_levels_and_places_are_exact_to_coded_precision(read):
    found = read(*SOUNDING)
    assert found.reports == 3
    assert not found.rejected
    temperature = values(found, "temperature")
    assert temperature.index.tolist() == [995.0, 850.0, 500.0]
    np.testing.assert_allclose(temperature, [271.85, 262.65, 243.15], rtol=0, atol=1e-9)
    geopotential = values(found, "geopotential")
    np.testing.assert_allclose(geopotential, np.array([92, 1324, 5252]) * GRAVITY, rtol=1e-12)
    rows = found.frame
    assert (set(rows["station"]), set(rows["latitude"])) == ({"USM00072518"}, {42.6917})
    assert (set(rows["longitude"]), set(rows["source"])) == ({-73.8317}, {"radiosonde"})


def test_wind_blows_from_its_direction(read):
    found = read(*SOUNDING)
    u, v = (values(found, f"{name}_component_of_wind") for name in "uv")
    assert u[850.0] == pytest.approx(12.3 * np.sin(np.deg2rad(100)), abs=1e-12)
    assert v[850.0] == pytest.approx(12.3 * np.cos(np.deg2rad(100)), abs=1e-12)
    np.testing.assert_allclose(np.hypot(u, v), [5.1, 12.3, 30.7], rtol=1e-12)


def test_humidity_is_that_of_the_depression_else_that_relative_to_saturation(read):
    wet, relative = SOUNDING[2], level(PRESS=70000, TEMP=-105, RH=500)
    found = values(read(header(NUMLEV=2), wet, relative), "specific_humidity")
    # Saturation pressures over water from the tables of Sonntag (1990): -20.5 and -10.5 deg C.
    assert found[850.0] == pytest.approx(0.622 * 120.4 / (85_000 - 0.378 * 120.4), rel=2e-3)
    assert found[700.0] == pytest.approx(0.622 * 137.7 / (70_000 - 0.378 * 137.7), rel=2e-3)


def test_the_time_of_a_level_is_release_plus_elapsed_time(read):
    rows = read(*SOUNDING).frame.drop_duplicates("level_hpa").set_index("level_hpa")["time"]
    assert rows.astype(str).tolist() == [
        "2017-01-02 11:04:00", "2017-01-02 11:08:22", "2017-01-02 11:20:30",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("hour", "release", "expected"),
    [
        ("00", 2315, "2017-01-01 23:15:00"),  # before the midnight of its nominal hour
        ("23", "0010", "2017-01-03 00:10:00"),
        ("12", 9999, "2017-01-02 12:00:00"),
        ("99", 1104, "2017-01-02 11:04:00"),
        ("12", 1199, "2017-01-02 11:00:00"),  # minutes unknown
    ],
)
def test_the_day_of_release(hour, release, expected, read):
    found = read(header(HOUR=hour, RELTIME=release, NUMLEV=1), level(PRESS=50000, TEMP=-300))
    assert str(found.frame["time"][0]) == expected


def test_removed_values_are_counted_and_missing_ones_are_not(read):
    lines = [level(PRESS=50000, GPH=-8888, TEMP=-8888, WDIR=270, WSPD=100), level(TEMP=-300)]
    found = read(header(NUMLEV=2), *lines)
    assert set(found.frame["variable"]) == {"u_component_of_wind", "v_component_of_wind"}
    assert found.rejected == {
        "removed by the quality control of IGRA": 2, "level without pressure": 1
    }  # fmt: skip


def test_soundings_of_another_time_are_not_decoded(read):
    period = Period.parse("2017-01-02", "2017-01-03")
    other = [header(YEAR=1999), *["x" * 51] * 3]  # decoding would be all NaN
    found = read(*other, *SOUNDING, *other, period=period)
    assert (found.reports, found.note) == (3, "2 soundings of another time are not read")
    assert len(read(*SOUNDING, *SOUNDING).frame) == 2 * len(found.frame)


def test_a_truncated_sounding_keeps_its_whole_levels(read):
    found = read(*SOUNDING[:3], SOUNDING[3][:20])
    assert (found.reports, found.note) == (2, "1 soundings are truncated")
    assert read(header(NUMLEV=3), *SOUNDING[1:3], *SOUNDING).reports == 5


def test_garbled_numbers_are_missing(read):
    garbled = SOUNDING[2].replace("-105", "-1O5")
    assert 850.0 not in values(read(header(NUMLEV=1), garbled), "temperature").index


def test_archives_of_one_file_are_read(tmp_path, refused):
    path = tmp_path / "USM00072518-data.txt.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("USM00072518-data.txt", "\n".join(SOUNDING))
    assert read_igra(path, Period()).reports == 3
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.txt", "")
    refused("not of one file", read_igra, path, Period())


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("letters", ["\xe9".encode("latin-1"), "\xe9".encode(), b"\0"])
@pytest.mark.parametrize("archived", [False, True])
def test_a_byte_that_is_not_ascii_is_refused_with_its_place(letters, archived, tmp_path, refused):
    path = tmp_path / "USM00072518-data.txt"
    lines = [line.encode() for line in SOUNDING]
    lines[1] = lines[1][:2] + letters + lines[1][2 + len(letters) :]
    path.write_bytes(b"\r\n".join(lines))
    if archived:
        with zipfile.ZipFile(f"{path}.zip", "w") as archive:
            archive.write(path, path.name)
        path = path.with_name(f"{path.name}.zip")
    refused(r"data.txt(.zip)?, line 2: byte 3 is not ASCII, .* copy", read_igra, path, Period())


def test_text_without_a_header_is_refused(read, refused):
    refused("no line is the header of an IGRA-2 sounding", read, *SOUNDING[1:])


LEVELS = {"001_KSGF": 100, "002_KBUF": 100, "003_KALB": 78, "006_KOKX": 86}


def text_level(pressure=850.0, **changes):
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
def read_text(tmp_path):
    def read_text(*lines, name="2009022800_001_KSGF_raob.txt"):
        path = tmp_path / name
        path.write_text("\n".join(lines))
        return read_sonde_text(path)

    return read_text


def test_values_are_converted(read_text):
    frame = read_text(text_level()).frame.set_index("variable")
    assert frame.loc["temperature", "value"] == pytest.approx(279.15)
    assert frame.loc["geopotential", "value"] == pytest.approx(1453 * GRAVITY)
    assert frame.loc["u_component_of_wind", "value"] == -6.6
    assert frame.loc["v_component_of_wind", "value"] == 1.2
    # 264.3 Pa is the saturation pressure over water at -11 deg C (Sonntag 1990).
    expected = 0.622 * 264.3 / (85_000 - 0.378 * 264.3)
    assert frame.loc["specific_humidity", "value"] == pytest.approx(expected, rel=2e-3)
    assert (set(frame["level_hpa"]), set(frame["station"])) == ({850.0}, {"KSGF"})
    assert (set(frame["longitude"]), set(frame["time"].astype(str))) == ({-93.4}, {"2009-02-28"})


def test_wind_comes_from_speed_and_direction_where_components_are_missing(read_text):
    frame = read_text(text_level(u=999.0, v=999.0, speed=10.0, direction=270.0)).frame.set_index(
        "variable"
    )
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
def test_flags_reject(changes, lost, read_text):
    every = {"temperature", "specific_humidity", "geopotential", "u_component_of_wind",
             "v_component_of_wind"}  # fmt: skip
    frame = read_text(text_level(**changes)).frame
    found = set(frame["variable"]) if len(frame) else set()
    assert every - found == lost


def test_heights_below_the_ground_are_rejected(read_text):
    below = text_level(1000.0, temperature=999.0, dewpoint=999.0, humidity=999.0, u=999.0, v=999.0,
                  speed=999.0, direction=999.0, altitude=146.0)  # fmt: skip
    found = read_text(below, text_level())
    assert set(found.frame["level_hpa"]) == {850.0}
    assert found.rejected == {"height below the ground": 1}


def test_a_pressure_of_999_hpa_and_a_height_of_999_m_are_sound(read_text):
    assert set(read_text(text_level(999.0, altitude=100.0)).frame["level_hpa"]) == {999.0}
    for pressure, sound in ((900.0, True), (300.0, False)):
        found = read_text(text_level(pressure, altitude=999.0)).frame
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
    assert DRY_AIR * np.trapezoid(layer.to_numpy(), logarithm) == pytest.approx(reported, rel=0.01)


def test_names_and_lines_that_are_not_those_of_a_sounding(read_text, refuses):
    refuses(
        GatesError,
        (
            r"its name holds no date and station.*rename it",
            lambda: read_text(text_level(), name="sounding.txt"),
        ),
        (
            "2009133800 in its name is no date",
            lambda: read_text(text_level(), name="2009133800_001_KSGF_raob.txt"),
        ),
    )
    found = read_text(text_level(), text_level()[:40])
    assert (found.reports, found.rejected["partially written lines"]) == (1, 1)
    assert not is_sonde_line(text_level().replace("850.0", "nan"))
