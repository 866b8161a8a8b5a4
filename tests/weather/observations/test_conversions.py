"""Conversions against published tables: WMO and Sonntag (1990), ICAO Doc 7488, NOAA."""

import numpy as np
import pytest

from weather.observations.conversions import (
    flight_level_pressure,
    heights_above_first,
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
