"""Conversions of units and humidity, and the hydrostatic equation."""

import numpy as np
import pytest

from weather.observations.conversions import (
    flight_level_pressure,
    heights_above_first,
    inconsistent_levels,
    saturation_pressure,
    sea_level_pressure,
    specific_humidity,
    station_pressure,
    virtual_temperature,
    wind_components,
)


def test_wind_is_named_after_where_it_comes_from():
    u, v = wind_components(np.full(4, 10.0), np.array([0.0, 90.0, 180.0, 270.0]))
    np.testing.assert_allclose(u, [0, -10, 0, 10], atol=1e-12)
    np.testing.assert_allclose(v, [-10, 0, 10, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("celsius", "pascal"), [(0.0, 611.2), (20.0, 2339.0), (30.0, 4246.8), (-20.0, 125.6)]
)
def test_saturation_pressure_over_water(celsius, pascal):
    assert saturation_pressure(np.array(273.15 + celsius)) == pytest.approx(pascal, rel=1e-3)


def test_humidity_of_saturated_air():
    found = specific_humidity(np.array([2339.0]), np.array([100_000.0]))
    assert found == pytest.approx(0.01468, rel=1e-3)
    assert virtual_temperature(np.array([293.15]), found) == pytest.approx(295.76, abs=0.01)
    assert virtual_temperature(np.array([293.15]), np.array([np.nan])) == 293.15


@pytest.mark.parametrize(
    ("elevation", "hectopascal"), [(0.0, 1013.25), (1000.0, 898.75), (3000.0, 701.09)]
)
def test_the_standard_altimeter_setting_gives_the_standard_pressure(elevation, hectopascal):
    found = station_pressure(np.array(101_325.0), np.array(elevation))
    assert found == pytest.approx(100 * hectopascal, rel=1e-4)


@pytest.mark.parametrize(
    ("altitude", "hectopascal"),
    [(5_000.0, 540.20), (9_144.0, 300.90), (11_000.0, 226.32), (16_000.0, 102.87)],
)
def test_flight_levels_are_heights_of_the_standard_atmosphere(altitude, hectopascal):
    assert flight_level_pressure(np.array(altitude)) == pytest.approx(100 * hectopascal, rel=1e-3)


def test_pressure_is_reduced_back_to_that_of_sea_level_in_the_standard_atmosphere():
    height = np.array([10.0, 250.0, 499.0])
    pressure = station_pressure(np.full(3, 101_325.0), height)
    found = sea_level_pressure(pressure, 288.15 - 0.0065 * height, height)
    np.testing.assert_allclose(found, 101_325.0, atol=5)
    cold = sea_level_pressure(pressure, 258.15 - 0.0065 * height, height)
    assert (np.diff(cold) > 0).all()  # a cold column is heavier, the more so the deeper it is


def test_an_isothermal_layer_has_the_thickness_of_the_hypsometric_equation():
    pressure = np.array([1000.0, 700.0, 500.0])
    found = heights_above_first(pressure, np.full(3, 273.15))
    np.testing.assert_allclose(found, 7995.3 * np.log(1000 / pressure), rtol=1e-4)


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
