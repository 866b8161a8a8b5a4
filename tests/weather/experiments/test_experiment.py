"""What all worlds offer as experiments, and how they differ."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from weather.baselines.assimilator import FreeRun
from weather.cycle import CycleStep
from weather.data.writing import differences
from weather.experiments.ensemble.source import EnsembleScores, Era5EnsembleSource
from weather.experiments.experiment import (
    OPTIMIZER_BOX,
    Experiment,
    Method,
    classical,
    experiment_of,
    shown,
    stored,
)
from weather.grid import regular_grid
from weather.metrics import Departures, figures, withheld_points
from weather.models.held_suarez.model import HeldSuarez
from weather.observations.gridded import GriddedObservations
from weather.state import ERA5_SAMPLE, SHALLOW_WATER


@pytest.fixture(scope="module")
def sample():
    return Era5EnsembleSource()


@pytest.fixture(params=["sample", "twin"])
def experiment(request, sample, twin):
    return sample if request.param == "sample" else twin.source()


def refuse(*_):
    raise AssertionError("nothing is to be trained")


def test_both_worlds_offer_the_whole_protocol(experiment):
    names = {name for name in vars(Experiment) if not name.startswith("_")}
    names |= set(Experiment.__annotations__) - {"__doc__"}
    assert names >= {"tasks", "methods", "trials", "scores", "checks", "figures", "reference"}
    stubs = vars(Experiment)
    assert all(hasattr(experiment, name) for name in names)
    assert all(getattr(type(experiment), n, 0) is not stubs[n] for n in names if n in stubs)
    assert experiment_of(experiment) is experiment
    assert experiment.observation_error.shape == (experiment.channels.num_channels,)
    assert f"rmse_{experiment.field}" in experiment.headline
    assert experiment.notes


def test_what_is_tuned_is_every_method_with_a_box_for_every_task(experiment):
    tasks = [task.name for task in experiment.tasks((0.3, 0.1))]
    assert len(set(tasks)) == 4
    trials = experiment.trials((0.3, 0.1), refuse, cycles=6, settings={})
    boxes = {
        f"{method.name}@{task}": method.box
        for task in tasks
        for method in experiment.methods(task)
        if method.box
    }
    assert {name: trial.space for name, trial in trials.items() if "@" in name} == boxes
    assert [name for name in trials if "@" not in name] == [*experiment.forms]
    assert trials["adas_increment"].space == OPTIMIZER_BOX


def test_a_trial_scores_a_setting(experiment):
    task = experiment.tasks((0.02,))[0].name
    box, score, *_ = experiment.trials((0.02,), refuse, cycles=6, settings={})[
        f"inverse_distance@{task}"
    ]
    close, far = ({"power": 3.0, "background_km": km} for km in (1000.0, 1e-3))
    assert set(box) == set(close)
    assert 0 < score(close) < score(far)  # the background counts a meter away: nothing is learned


def test_the_reference_is_a_method(experiment):
    for task in experiment.tasks():
        assert classical(experiment.methods(task.name), experiment.reference)


def test_a_twin_says_where_its_truth_is_and_makes_it_once(twin, tmp_path):
    source = twin.source()
    said = []

    def progress(label, total):
        said.append(label)
        raise AssertionError("all is there")

    assert list(source.make(tmp_path, progress)) == [source.world.path, source.path]
    source.check()
    assert source.store(tmp_path) == source.world.path
    assert said == []


def test_the_sample_is_written_where_it_is_asked_for(sample, tmp_path):
    (path,) = sample.make(tmp_path)
    assert path == sample.store(tmp_path) == tmp_path / "era5_ensemble.zarr"
    assert path.is_dir()


def test_work_is_computed_in_any_order_and_taken_by_name(experiment):
    ticks, rows = [], []
    for turn in (1, -1):
        scores = experiment.scores((0.02,), refuse, (), (), {}, quick=True)
        works = [w for w in scores.works() if w.method in ("inverse_distance", *experiment.base)]
        assert len({(w.method, w.task, w.scope) for w in works}) == len(works)
        found = {work: scores.compute(work, lambda: ticks.append(1)) for work in works[::turn]}
        for work in works:
            scores.take(work, {name: tensor.clone() for name, tensor in found[work].items()})
        rows.append(repr(scores.rows()))
    assert len(ticks) == 2 * sum(work.ticks for work in works)
    assert rows[0] == rows[1]
    assert {row.method for row in scores.rows()} == {"inverse_distance", *experiment.base}


def test_what_is_trained_on_is_not_tested_on(experiment):
    trained, tested = experiment.training_objects(), experiment.test_objects()
    assert trained
    assert tested
    assert not set(trained) & set(tested)
    (data,) = experiment.data()
    assert len(data.sha256) == 64


def test_of_many_levels_the_middle_one_is_shown():
    assert shown(ERA5_SAMPLE, "rmse") == {"rmse_z850", "rmse_z500", "rmse_t850", "rmse_t500"}
    assert shown(HeldSuarez().channels, "rmse") == {"rmse_sp", "rmse_t5", "rmse_u5", "rmse_v5"}
    assert shown(SHALLOW_WATER, "ob", "oa") == {f"{o}_{x}" for o in ("ob", "oa") for x in "huv"}


def described(stirring, **facts):
    return json.dumps({"model": f"ShallowWater(truncation=12, stirring={stirring})", **facts})


@pytest.mark.parametrize(
    ("found", "expected", "words"),
    [
        (
            described(5e-10, cycles=24, seed=0),
            described(4e-10, cycles=420, seed=0),
            "cycles 24 instead of 420, model.stirring 5e-10 instead of 4e-10",
        ),
        (described(1), described(1, settling=8), "settling absent instead of 8"),
        ("no nature run", "{}", "no nature run instead of {}"),
    ],
)
def test_only_what_differs_is_named(found, expected, words):
    assert differences(found, expected) == words


def only(rows, **wanted):
    (row,) = [r for r in rows if all(getattr(r, name) == v for name, v in wanted.items())]
    return row


@pytest.mark.fault("weather A10")
def test_two_times_make_no_difference_significant():
    cases = [SimpleNamespace(member=m, time=t) for t in range(2) for m in range(9)]
    source = SimpleNamespace(
        cases=lambda kind: cases, channels=SimpleNamespace(labels=("z", "t")), times=None
    )
    kinds = ("persistence", "ensemble")
    tasks = [SimpleNamespace(name=f"{kind}/0.1", density=0.1) for kind in kinds]
    tasks[0].density = 0.3
    scores = EnsembleScores(source, tasks, None, (), (), {})
    assert scores.pictured() == (tasks[0], cases[-1])  # of the largest density
    for kind in kinds:
        for method, factor in (("background", 4.0), ("oi", 1.0)):
            square = 1 + torch.rand(18, 2, generator=torch.Generator().manual_seed(0))
            scores.errors[f"{kind}/0.1", method] = factor * square[None]
            scores.departures[f"{kind}/0.1", method] = (None, None)
    gap = only(scores.rows(), task="ensemble/0.1", metric="rmse_z", versus="background")
    assert gap.high < 0
    assert (gap.p, gap.n, gap.significant) == (0.5, 2, False)
    own = only(scores.rows(), task="ensemble/0.1", metric="ratio_z", method="oi")
    assert own.value == pytest.approx(0.5)


GRID = regular_grid(16, 32, poles=False)


class HalfWay:
    """Analyze to the middle between background and observation, where there is one."""

    members = 1

    def analyze(self, background, observations):
        innovation = (observations.values - background[:, 0]) * observations.mask
        return background + innovation[:, None] / 2


@pytest.fixture
def step():
    """Background 0 and observations 2 everywhere in channel 0, 4 in channel 1; two timelines."""
    values = torch.tensor([2.0, 4.0])[:, None, None].expand(2, 2, 16, 32)
    observations = GriddedObservations.from_values(values, torch.ones(2))
    background = torch.zeros(2, 1, 2, 16, 32)
    return CycleStep(background, HalfWay().analyze(background, observations), observations)


def points():
    return torch.stack([withheld_points(GRID, 0, member) for member in range(2)])


def test_a_tenth_of_the_points_is_withheld_alike_at_each_call():
    chosen = withheld_points(GRID, 3, 1)
    assert torch.equal(chosen, withheld_points(GRID, 3, 1))
    assert not torch.equal(chosen, withheld_points(GRID, 3, 2))
    assert 0.05 < chosen.double().mean() < 0.16


def test_figures_of_a_known_analysis(step):
    departures = Departures(points())
    departures.add(step, HalfWay())
    found = figures(departures.assimilated, departures.withheld)
    assert (found["ob_bias"], found["oa_bias"]) == ([2.0, 4.0], [1.0, 2.0])
    assert found["oa_rms"] == [1.0, 2.0]
    # The withheld points keep the background: the analysis did not see them.
    assert found["withheld_rmse"] == [2.0, 4.0]
    assert float(departures.withheld.number[0]) == points().sum()
    assert float(departures.assimilated.number[0]) == 2 * 16 * 32


def test_timelines_that_are_lost_do_not_count(step):
    step.analysis[1] = math.nan
    departures = Departures(points())
    departures.add(step, HalfWay(), keep=torch.tensor([True, False]))
    assert figures(departures.assimilated, departures.withheld)["oa_rms"] == [1.0, 2.0]
    assert float(departures.assimilated.number[0]) == 16 * 32
    nobody = Departures(points())
    nobody.add(step, FreeRun(), keep=torch.tensor([False, False]))
    assert all(math.isnan(x) for x in figures(nobody.assimilated, None)["ob_rms"])


def test_extra_analyses_are_made_every_so_often(step):
    calls = []

    class Counting(HalfWay):
        def analyze(self, background, observations):
            calls.append(int(observations.mask.sum()))
            return super().analyze(background, observations)

    departures = Departures(points(), every=3)
    for _ in range(7):
        departures.add(step, Counting())
    assert (len(calls), set(calls)) == (3, {2 * int((~points()).sum())})
    assert float(departures.assimilated.number[0]) == 7 * 2 * 16 * 32


def test_stored_settings_are_found_by_method_and_task():
    method = Method("oi", lambda _: None, {"scale": (0.01, 1.0), "length_km": (100.0, 400.0)})
    setting = {"scale": 0.2, "length_km": 300.0}
    assert stored({"oi@a": setting, "letkf@b": {}}, method, "a") == setting
    middle = stored({"oi@a": setting}, method, "b")
    assert middle == pytest.approx({"scale": 0.1, "length_km": 200.0})
