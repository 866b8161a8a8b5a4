import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from weather.observations.profile import interpolate_profiles
from weather.observations.table import ObservationTable

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("GATES_SHARED", ROOT.parent / "shared"))


def profile(pressures, values, **columns):
    frame = pd.DataFrame(
        {
            "time": pd.Timestamp("2020-01-01"),
            "latitude": 50.0,
            "longitude": 10.0,
            "variable": "temperature",
            "level_hpa": pressures,
            "value": values,
            "error": 1.0,
            "station": "A",
            "qc": 0,
        }
    )
    return frame.assign(**columns)


def interpolated(*frames, levels, **options):
    table = ObservationTable.from_frame(pd.concat(frames, ignore_index=True))
    result = interpolate_profiles(table, levels, **options).frame
    return result.sort_values(["station", "level_hpa"], ignore_index=True)


def test_values_linear_in_log_pressure_are_exact():
    pressures = np.array([1000.0, 780, 620, 450, 300])
    values = 200 + 15 * np.log(pressures)
    result = interpolated(profile(pressures, values), levels=(850, 500, 700, 250))
    assert result["level_hpa"].tolist() == [500, 700, 850]  # nothing is extrapolated to 250
    np.testing.assert_allclose(result["value"], 200 + 15 * np.log([500, 700, 850]))


def test_errors_are_interpolated_and_the_rest_is_kept():
    frame = profile([900.0, 810.0], [280.0, 276.0], error=[1.0, 3.0], source="sonde")
    result = interpolated(frame, levels=[np.sqrt(900 * 810)])
    assert result["value"].tolist() == pytest.approx([278])
    assert result["error"].tolist() == pytest.approx([2])
    assert result.loc[0, ["station", "source", "latitude"]].tolist() == ["A", "sonde", 50.0]


def test_wide_gaps_are_not_bridged():
    frame = profile([1000.0, 700.0, 250.0], [290.0, 270.0, 220.0])
    assert interpolated(frame, levels=(850, 500))["level_hpa"].tolist() == [850]
    bridged = interpolated(frame, levels=(850, 500), max_gap=1.1)
    assert bridged["level_hpa"].tolist() == [500, 850]


def test_reported_levels_are_kept_beside_gaps():
    frame = profile([1000.0, 300.0], [290.0, 220.0])
    result = interpolated(frame, levels=(1000, 500, 300))
    assert result["level_hpa"].tolist() == [300, 1000]
    assert result["value"].tolist() == [220, 290]


def test_stations_do_not_mix():
    first = profile([900.0, 800.0], [280.0, 280.0])
    second = profile([900.0, 800.0], [260.0, 260.0], station="B")
    result = interpolated(first, second, levels=[850])
    assert result["value"].tolist() == pytest.approx([280, 260])


def test_single_reports_and_flagged_ones_stay():
    surface = profile([np.nan], [285.0], variable="2m_temperature")
    lone = profile([777.0], [275.0], station="B")
    flagged = profile([850.0], [200.0], qc=1)
    sound = profile([900.0, 800.0], [280.0, 280.0])
    result = interpolated(surface, lone, flagged, sound, levels=[850])
    assert len(result) == 4
    good = result[(result["qc"] == 0) & (result["level_hpa"] == 850)]
    assert good["value"].tolist() == pytest.approx([280])
    assert 777.0 in result["level_hpa"].tolist()


def test_empty_table():
    assert len(interpolate_profiles(ObservationTable.empty(), (850, 500))) == 0


@pytest.mark.skipif(not SHARED.exists(), reason="the shared real data are absent")
def test_real_radiosonde_agrees_with_its_mandatory_levels():
    """Leave the mandatory levels out of a real flight and interpolate them back."""
    path = SHARED / "data/weather/2009022800_001_KSGF_raob.txt"
    columns = np.loadtxt(path, usecols=(1, 2), skiprows=0)
    pressure, celsius = columns[(columns < 999).all(1) & (columns[:, 0] > 90)].T
    mandatory = np.isin(pressure, (850, 700, 500, 300))
    assert mandatory.sum() >= 3
    rest = profile(pressure[~mandatory], celsius[~mandatory] + 273.15)
    result = interpolated(rest, levels=pressure[mandatory].astype(int))
    expected = dict(zip(pressure[mandatory], celsius[mandatory] + 273.15, strict=True))
    for level, value in zip(result["level_hpa"], result["value"], strict=True):
        assert value == pytest.approx(expected[level], abs=2.0)
    assert len(result) == mandatory.sum()
