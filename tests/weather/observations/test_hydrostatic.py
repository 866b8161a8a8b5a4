import numpy as np
import pytest

from weather.observations.conversions import heights_above_first, inconsistent_levels

MANDATORY = np.array([1000.0, 925, 850, 700, 500, 400, 300, 250, 200, 150, 100])


def sounding(pressure=MANDATORY):
    """Heights rounded to 10 m that fit temperatures rounded to .1 K."""
    virtual = np.round(np.maximum(216.65, 290 * (pressure / 1000) ** 0.19), 1)
    return pressure, np.round(100 + heights_above_first(pressure, virtual), -1), virtual


def test_a_sound_sounding_passes_in_any_order():
    pressure, height, virtual = sounding()
    order = np.random.default_rng(0).permutation(len(pressure))
    for found in inconsistent_levels(pressure[order], height[order], virtual[order]):
        assert not found.any()


@pytest.mark.parametrize("level", range(1, len(MANDATORY) - 1))
@pytest.mark.parametrize("error", [-500.0, 300.0])
def test_a_wrong_height_is_found_and_nothing_else(level, error):
    pressure, height, virtual = sounding()
    height[level] += error
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(heights).tolist() == [level]
    assert not temperatures.any()


def test_a_wrong_temperature_costs_its_layers():
    pressure, height, virtual = sounding()
    virtual[4] += 40  # a wrong sign at 500 hPa
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(temperatures).tolist() == [3, 4, 5]
    assert np.flatnonzero(heights).tolist() == [3, 4, 5]


def test_a_wrong_height_between_close_levels_is_found():
    pressure = np.concatenate([np.linspace(1000, 300, 71)])
    _, height, virtual = sounding(pressure)
    height[33] += 100
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(heights).tolist() == [33]
    assert not temperatures.any()


def test_missing_values_do_not_matter():
    pressure, height, virtual = sounding()
    height[[2, 7]] = np.nan
    virtual[[3, 9]] = np.nan
    height[5] += 400
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(heights).tolist() == [5]
    assert not temperatures.any()
    for few in (0, 1, 2):
        found = inconsistent_levels(pressure[:few], height[:few], virtual[:few])
        assert [one.tolist() for one in found] == [[False] * few] * 2
    nothing = np.full(len(pressure), np.nan)
    assert not np.any(inconsistent_levels(pressure, nothing, virtual))


def test_rounded_pressures_high_up_are_accepted():
    pressure = np.array([20.0, 13.4, 10.1, 8.7])
    height = np.round(26_000 + heights_above_first(pressure + 0.04, np.full(4, 220.0)), 1)
    for found in inconsistent_levels(pressure, height, np.full(4, 220.0)):
        assert not found.any()
