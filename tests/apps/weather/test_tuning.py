"""What is tuned: equal trials, beyond the box if need be, and what stands in for no choice."""

import math
from types import SimpleNamespace

import pytest

from apps.weather.networks import NEUTRAL, without_training, world_alone
from apps.weather.scoring import Budget, KeptByRun, Tuning, chosen_methods, settings_of
from harness.evidence import Row
from harness.experiment import Run, SettingsDiffer
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.experiment import Method, Trial, choice_name, stored

METHOD = Method("oi", lambda s: OptimalInterpolation(None, scale=s["scale"]), {"scale": (0.01, 1)})
SETTINGS = {
    "data.source.class_path": "World",
    "data.source.init_args.world.init_args.cycles": 24,
    "data.source.init_args.block": 4,
    "data.steps": 14,
    "model.learning_rate": 0.003,
    "trainer.max_epochs": 1,
}


class Bowl:
    """An experiment whose best scale is 4, beyond the box; above 5 it refuses."""

    max_cycles = None
    decisive = ("world",)

    def trials(self, densities, fit, *, cycles, settings):
        def score(setting):
            if setting["scale"] > 5:
                raise ValueError("the scale is too large")
            return abs(math.log(setting["scale"] / 4))

        return {choice_name("oi", f"{one}/perfect"): Trial({"scale": (0.03, 3.0)}, score)
                for one in densities}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "a", app="weather", settings=SETTINGS)


def test_an_optimum_beyond_the_box_is_reached_and_refused_settings_never_win(run, capsys):
    tuning = Tuning(Bowl(), None, (0.1,), Budget(trials=32))
    (name,) = choices = tuning.classical(run)
    assert name == "oi@0.1/perfect"
    choice = choices[name]
    assert 3.0 < choice.setting["scale"] <= 5.0
    scores = [trial["score"] for trial in choice.trials]
    assert len(scores) == 32
    assert any(score is None for score in scores)  # NaN
    assert min([t["scale"] for t in choice.trials if t["score"] is None]) > 5
    capsys.readouterr()
    assert repr(tuning.classical(run)) == repr(choices)
    assert "missing" not in capsys.readouterr().out


def test_a_choice_knows_the_world_alone(run, refused):
    experiment = Bowl()
    kept = [name for name in SETTINGS if name not in world_alone(run, experiment)]
    assert kept == ["data.source.class_path", "data.source.init_args.world.init_args.cycles"]
    Tuning(experiment, None, (0.1,), Budget(trials=2)).classical(run)
    name = "oi@0.1/perfect"
    other = Run(run.folder, app="weather", settings={**SETTINGS, "data.steps": 2})
    found = chosen_methods(other, experiment, [name, "letkf@0.1/perfect"])
    assert set(found) == {name}
    assert stored(settings_of(found), METHOD, "0.1/perfect") == found[name].setting
    world = {**SETTINGS, "data.source.init_args.world.init_args.cycles": 25}
    elsewhere = Run(run.folder, app="weather", settings=world)
    refused(
        r"world.init_args.cycles 24, now 25",
        chosen_methods,
        elsewhere,
        experiment,
        [name],
        error=SettingsDiffer,
    )


def test_what_a_trial_of_a_network_has_of_its_own_is_left_out(run):
    left = [name for name in SETTINGS if name not in without_training(run)]
    assert set(SETTINGS) - set(left) == {"data.steps", "model.learning_rate", "trainer.max_epochs"}
    assert all(name.rpartition(".")[0].endswith("init_args") for name in NEUTRAL)


def test_a_trial_of_a_network_trains_with_the_setting(run):
    seen = []

    def fit(piece, job, setting, steps, **options):
        seen.append((piece.method, piece.seed, setting, steps, options))
        return "network"

    def trials(densities, fit, *, cycles, settings):
        assert (densities, cycles) == ([0.3], 0)

        def score(setting):
            return float(fit("ungated", setting) == "network")

        return {"ungated": Trial({"learning_rate": (1e-3, 1e-2)}, score)}

    experiment = SimpleNamespace(trials=trials, max_cycles=None)
    tuning = Tuning(experiment, SimpleNamespace(fit=fit), (0.1,), Budget(2, (0.3,), 160, 5))
    piece = run.piece("ungated", 0, steps=5, densities=[0.3], learning_rate=0.002)
    assert tuning.trial(piece, None) == {"score": 1.0}
    options = {"max_epochs": 1, "limit_val_batches": 0}
    assert seen == [("ungated", 0, {"learning_rate": 0.002}, 5, options)]


@pytest.mark.fault("46 WEATHER")
def test_methods_are_compared_as_assimilate_runs_them(tmp_path):
    run, task = Run(tmp_path / "run", app="weather"), "0.01/perfect"
    errors = {"oi": 4.0, "adas_oi": 3.0, "adas_oi_tapered": 5.0, "adas_increment": 6.0}
    run.finish([Row(name, task, "rmse_h", value) for name, value in errors.items()], seeds=[0])
    kept = KeptByRun(run, SimpleNamespace(channels=SimpleNamespace(labels=["h"])))
    found = {"oi": 4.0, "adas_oi": 5.0, "adas_increment": 6.0}
    assert kept.scored(task) == pytest.approx(found)
