from apps.weather.tuning import tuned

from weather.baselines.free_run import FreeRun
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.method import Method

METHOD = Method("oi", lambda s: OptimalInterpolation(None, scale=s["scale"]), {"scale": (0.01, 1)})


def test_a_stored_setting_is_taken_in_silence(capsys):
    assert tuned({"oi/0.1": {"scale": 0.3}}, METHOD, "0.1").scale == 0.3
    assert capsys.readouterr().out == ""


def test_a_setting_that_is_missing_or_of_another_box_is_named(capsys):
    for settings in ({}, {"oi/0.1": {"inflation": 0.3}}):
        assert abs(tuned(settings, METHOD, "0.1").scale - 0.1) < 1e-12
        assert "oi/0.1 was never tuned" in capsys.readouterr().out


def test_a_method_without_settings_needs_none(capsys):
    assert tuned({}, Method("free_run", lambda _: FreeRun()), "0.1").members == 1
    assert capsys.readouterr().out == ""
