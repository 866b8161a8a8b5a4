import numpy as np
import pytest

from weather.observations.report_table import observation_error

LEVELS = np.array([1000.0, 850.0, 500.0, 250.0, 10.0])


def test_errors_are_those_of_the_levels_and_linear_in_the_logarithm_of_pressure():
    found = observation_error("temperature", LEVELS)
    assert found.tolist() == [1.7, 1.5, 1.2, 1.5, 2.5]
    middle = observation_error("temperature", np.array([np.sqrt(850 * 700)]))
    assert middle == pytest.approx([1.4])
    beyond = observation_error("temperature", np.array([1050.0, 5.0]))
    assert beyond.tolist() == [1.7, 2.5]
    both = [observation_error(f"{name}_component_of_wind", LEVELS) for name in "uv"]
    assert np.array_equal(*both)


def test_surface_reports_have_one_error():
    assert observation_error("2m_temperature", np.array([np.nan] * 2)).tolist() == [1.5, 1.5]
    assert observation_error("mean_sea_level_pressure", np.array([np.nan])) == 100.0


def test_the_error_of_humidity_is_a_fraction_of_saturation():
    warm, cold = observation_error(
        "specific_humidity", np.array([1000.0, 1000.0]), np.array([293.15, 253.15])
    )
    assert warm == pytest.approx(0.15 * 0.01468, rel=1e-3)
    assert cold == pytest.approx(0.15 * 0.000782, rel=5e-3)
    hot = observation_error("specific_humidity", np.array([5.0]), np.array([400.0]))
    assert 0 < hot < 1


def test_other_variables_have_none():
    assert np.isnan(observation_error("total_precipitation", LEVELS)).all()
