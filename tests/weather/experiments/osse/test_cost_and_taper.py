"""What an analysis costs, 4D-Var at several counts of iterations, and networks that are tapered."""

import time

import torch

from harness.evidence import Row
from tests.weather.experiments.osse.conftest import experiment
from weather.experiments.osse import rivals
from weather.experiments.osse.osse_cycles import OsseCycles
from weather.experiments.osse.osse_scores import costs
from weather.experiments.twin.scenarios import observed
from weather.models.adas.analysis import nearness


def test_error_over_cost_is_that_of_the_task_with_most_methods():
    rows = [
        Row("adas_oi", "a", "over_damped_oi", 0.7, 0.6, 0.8),
        Row("free_run", "a", "over_damped_oi", 3.0, 2.0, 4.0),
        Row("adas_oi", "b", "over_damped_oi", 0.6, 0.5, 0.7),
        Row("letkf", "b", "over_damped_oi", 1.6, 1.5, 1.7),
        Row("adas_oi_tapered", "b", "over_damped_oi", 0.6, 0.5, 0.7),
        Row("untimed", "b", "over_damped_oi", 0.6, 0.5, 0.7),
        Row("letkf", "b", "over_oi", 0.8, 0.7, 0.9),
    ]
    assert costs(rows) == {}
    timed = ("damped_oi", "adas_oi", "adas_oi_tapered", "letkf", "free_run")
    rows += [Row(name, place, "milliseconds", 9.0) for name in timed for place in "ab"]
    rows += [Row(name, place, "milliseconds_over_oi", 3.0) for name in timed for place in "ab"]
    assert costs(rows) == {"b": {
        "damped_oi": (3.0, 1.0, 1.0, 1.0),
        "adas_oi": (3.0, 0.6, 0.5, 0.7),
        "letkf": (3.0, 1.6, 1.5, 1.7),
    }}  # fmt: skip


class Busy:
    """Takes so many milliseconds of CPU time in its first analyses, and so many in all others."""

    members = 2

    def __init__(self, first, others):
        self.milliseconds, self.shapes = [*first, *[others] * 99], []

    def analyze(self, background, observations):
        end = time.process_time() + self.milliseconds[len(self.shapes)] / 1000
        self.shapes.append(tuple(background.shape))
        while time.process_time() < end:
            pass
        return background


def test_the_time_of_an_analysis_is_a_median_and_that_of_interpolation_next_to_it(folder):
    """They take turns in being first, and timed: the second finds warm caches."""
    made = experiment(folder)
    runs = OsseCycles(made.world, made._rivals(made.world))
    method, interpolation = Busy([30, 1, 30], 4), Busy([30], 2)
    found = runs.times(made.tasks((0.1,))[0], "letkf", method, interpolation)
    assert method.shapes == [(1, 2, 3, 16, 32)] * 20  # one timeline
    assert interpolation.shapes == [(1, 1, 3, 16, 32)] * 10
    assert 4 <= float(found["milliseconds"]) < 8
    assert 1.3 < float(found["milliseconds_over_oi"]) < 3


def test_4d_var_is_scored_at_four_counts_of_iterations_each_tuned_by_itself(folder, monkeypatch):
    made = experiment(folder)
    monkeypatch.setattr(rivals, "SPARSE", 0.2)
    found = {m.name: m for m in made._rivals(made.world).classical(made.tasks((0.1,))[0])}
    counts = {name: method.build({"scale": 0.3}).settings.max_iterations
              for name, method in found.items() if name.startswith("four_d_var")}  # fmt: skip
    assert counts == {"four_d_var_2": 2, "four_d_var_4": 4, "four_d_var_8": 8, "four_d_var": 20}
    trials = made.trials((0.1,), None, cycles=4, settings={})
    assert {f"{name}@0.1/perfect" for name in counts} < set(trials)


def test_networks_are_scored_with_and_without_the_taper(folder):
    made = experiment(folder)
    scores = made.scores((0.3, 0.1), None, (0, 1), (), {})
    found = {(w.method, w.task): w for w in scores.works() if w.method.endswith("_tapered")}
    tasks = ("0.1/perfect", "0.1/error", "0.3/perfect", "0.3/error")
    assert set(found) == {(f"{name}_tapered", task) for name in ("adas_oi", "adas_increment")
                          for task in tasks}  # fmt: skip
    assert dict(found["adas_oi_tapered", tasks[0]].scope)["seeds-"] == "0+1"
    world, task = made.world, scores.task(tasks[0])
    background = world.first_background("training")
    reports = next(iter(observed(task, world, "training", range(4)))).withhold(
        torch.arange(32).expand(3, 16, 32) < 2)  # fmt: skip
    whole, ended = (scores._built(task, name).analyze(background, reports)
                    for name in ("adas_increment", "adas_increment_tapered"))  # fmt: skip
    far = (nearness(reports.mask, made.grid) == 0)[:, None, None].expand_as(whole)
    assert far.any()
    assert torch.equal(ended[far], background[far])
    assert not torch.equal(whole[far], background[far])


def test_settings_of_what_a_method_builds_on_name_its_results(folder):
    made = experiment(folder)
    names, task = [], "0.1/perfect"
    for scale in (0.3, 0.4):
        settings = {f"oi@{task}": {"scale": scale, "length_km": 5000.0, "turn": 3.0}}
        works = made.scores((0.1,), None, (0,), (), settings).works()
        names.append({w.method: dict(w.scope)["settings-"] for w in works if w.task == task})
    changed = {name for name in names[0] if names[0][name] != names[1][name]}
    assert changed == set(names[0])  # times of all methods are those over interpolation
