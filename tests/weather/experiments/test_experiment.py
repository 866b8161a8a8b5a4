"""What both worlds offer as experiments."""

import pytest
import torch

from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.experiments.experiment import (
    OPTIMIZER_BOX,
    Experiment,
    classical,
    experiment_of,
    shown,
)
from weather.models.adas.presets import COMPARED
from weather.models.held_suarez.model import HeldSuarez
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
    assert all(hasattr(experiment, name) for name in names)
    assert experiment_of(experiment) is experiment
    assert experiment.observation_error.shape == (experiment.channels.num_channels,)
    assert f"rmse_{experiment.field}" in experiment.headline
    assert experiment.notes


def test_what_is_tuned_is_every_method_with_a_box_for_every_task(experiment):
    tasks = [task.name for task in experiment.tasks((0.3, 0.1))]
    assert len(set(tasks)) == 4
    trials = experiment.trials((0.3, 0.1), refuse, cycles=6)
    boxes = {
        f"{method.name}@{task}": method.box
        for task in tasks
        for method in experiment.methods(task)
        if method.box
    }
    assert {name: box for name, (box, _) in trials.items() if "@" in name} == boxes
    assert [name for name in trials if "@" not in name] == [*COMPARED]
    assert trials["adas_increment"].box == OPTIMIZER_BOX


def test_a_trial_scores_a_setting(experiment):
    task = experiment.tasks((0.02,))[0].name
    box, score = experiment.trials((0.02,), refuse, cycles=6)[f"inverse_distance@{task}"]
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


@pytest.mark.fault("weather A10")
def test_members_at_one_time_are_one_unit(sample):
    """Nine members at two times are no eighteen, nor nine, independent cases."""
    for quick, times in ((False, 2), (True, 1)):
        scores = sample.scores((0.1,), refuse, (), (), {}, quick=quick)
        for work in scores.works():
            if work.method == "background":
                assert work.ticks == (3 if quick else 18)
                errors = torch.rand(work.ticks, 4) + 1
                scores.take(work, {**scores.compute(work), "errors": errors})
        rows = [row for row in scores.rows() if row.metric.startswith(("rmse", "ratio"))]
        assert {row.n for row in rows} == {times}
        assert "two test times, which n counts" in sample.notes[0]
        assert all(row.low <= row.value <= row.high for row in rows)


def test_of_many_levels_the_middle_one_is_shown():
    assert shown(ERA5_SAMPLE, "rmse") == {"rmse_z850", "rmse_z500", "rmse_t850", "rmse_t500"}
    assert shown(HeldSuarez().channels, "rmse") == {"rmse_sp", "rmse_t5", "rmse_u5", "rmse_v5"}
    assert shown(SHALLOW_WATER, "ob", "oa") == {f"{o}_{x}" for o in ("ob", "oa") for x in "huv"}
