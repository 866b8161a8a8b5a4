import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weather.baselines.assimilator import FreeRun
from weather.experiments.ensemble.ensemble_sample import (
    TASKS,
    EnsembleTask,
    ensemble_methods,
    gates_by_time,
)
from weather.experiments.ensemble.source import Era5EnsembleSource, _augment

PERSISTENCE, ENSEMBLE = TASKS
DENSITY = 0.1


@pytest.fixture(scope="module")
def source():
    return Era5EnsembleSource()


@pytest.fixture(scope="module")
def plain():
    return Era5EnsembleSource(augment=False)


def problems(source, task, count=120, **options):
    pairs = ((step, timeline) for step in range(count) for timeline in range(2))
    return [
        source.problem(step, timeline, **options)
        for step, timeline in pairs
        if TASKS[(step + timeline) % 2] == task
    ]


def where(source, field):
    """(member, time) of a field of the sample."""
    found = (source.fields == field).all(-1).all(-1).all(-1).nonzero().tolist()
    assert len(found) == 1
    return tuple(found[0])


def test_a_problem_is_a_function_of_seed_step_and_timeline(source):
    again, other = Era5EnsembleSource(), Era5EnsembleSource(seed=1)
    for step, timeline in ((0, 0), (7, 3)):
        left, right = source.problem(step, timeline), again.problem(step, timeline)
        assert torch.equal(left.background, right.background)
        assert torch.equal(left.truth, right.truth)
        assert torch.equal(left.observations.values, right.observations.values)
        assert not torch.equal(left.truth, other.problem(step, timeline).truth)
        assert not torch.equal(left.truth, source.problem(step, timeline + 2).truth)


def test_member_zero_is_never_the_truth(plain):
    for task in TASKS:
        truths = {where(plain, problem.truth) for problem in problems(plain, task, 90)}
        times = {1} if task == PERSISTENCE else {0, 1}
        assert truths == set(itertools.product(range(1, 10), times))
        for tuning in (False, True):
            assert all(1 <= case.member <= 9 for case in plain.cases(task, tuning=tuning))


def test_training_never_sees_the_second_day(plain):
    for problem in problems(plain, PERSISTENCE, 40):
        (member, time), (truth, end) = where(plain, problem.background), where(plain, problem.truth)
        assert (time, end) == (0, 1)
        assert member not in (0, truth)
    for case in plain.cases(PERSISTENCE):
        assert case.time in (2, 3)
        assert torch.equal(case.truth, plain.fields[case.member, case.time])
        member, time = where(plain, case.background)
        assert time == case.time - 1
        assert member not in (0, case.member)


def test_training_backgrounds_never_give_the_truth_away(plain):
    """The truth must not follow from the background and what all problems have in common.

    With the mean of the nine others it would be 10 M - 9 x_b, M being the mean of all ten.
    """
    total = plain.fields[:, :2].double().sum(0)  # (time, C, H, W)
    kinds = set()
    for problem in problems(plain, ENSEMBLE, 40):
        _, time = where(plain, problem.truth)
        background, truth = problem.background.double(), problem.truth.double()
        spread = plain.error_sd[ENSEMBLE].double() * 2
        for count in (1, 8, 9):
            guess = total[time] - count * background
            distance = (guess - truth).square().mean((1, 2)).sqrt() / spread
            assert distance.min() > 0.3, count
        single = (plain.fields[:, time] == problem.background).all(-1).all(-1).all(-1)
        if single.any():
            kinds.add(1)
            assert not torch.equal(problem.background, problem.truth)
            continue
        kinds.add(8)
        others = [m for m in range(10) if not torch.equal(plain.fields[m, time], problem.truth)]
        leave = [(plain.fields[others, time].sum(0) - plain.fields[m, time]) / 8 for m in others]
        assert any(torch.allclose(problem.background, mean, rtol=1e-5) for mean in leave)
    assert kinds == {1, 8}


def test_the_background_error_of_tests_is_that_of_nine_others(source):
    for case in source.cases(ENSEMBLE):
        others = [m for m in range(10) if m != case.member]
        assert torch.equal(case.ensemble, source.fields[others, case.time])
        assert torch.equal(case.background, case.ensemble.mean(0))
    for case in source.cases(PERSISTENCE):
        others = [m for m in range(10) if m != case.member]
        assert torch.equal(case.ensemble, source.fields[others, case.time - 1])
    for task in TASKS:
        both = [{(c.member, c.time) for c in source.cases(task, tuning=t)} for t in (False, True)]
        assert len(both[0]) == 18
        assert not both[0] & both[1]
        assert {case.time for case in source.cases(task, tuning=True)} == {1}


def test_augmentation_is_a_symmetry(source):
    """Roll, flip and sign keep the size of the error in every channel and row, and pair them."""
    background, truth = source.fields[1, 0], source.fields[2, 1]
    weights = source.grid.area_weights()[:, None]

    def size(error):
        return (error.double().square() * weights).mean((-2, -1)).sqrt()

    seen = set()
    for seed in range(40):
        moved, target = _augment(background, truth, torch.Generator().manual_seed(seed))
        assert_close(size(target - moved), size(truth - background), rtol=1e-5, atol=1e-5)
        for flip, roll in itertools.product((False, True), range(120)):
            field = moved.flip(-2) if flip else moved
            if torch.equal(field.roll(-roll, -1), background):
                break
        else:
            pytest.fail("the background is neither rolled nor flipped")
        error = (target - moved).flip(-2) if flip else target - moved
        error = error.roll(-roll, -1)
        sign = 1 if torch.allclose(error, truth - background, atol=0.1) else -1
        assert_close(sign * error, truth - background, rtol=1e-4, atol=0.1)
        seen.add((flip, sign))
        rolled = roll > 0
    assert len(seen) == 4
    assert rolled


def test_augmented_problems_observe_the_augmented_truth(source):
    for task in TASKS:
        error = source.error_sd[task][:, None, None]
        for problem in problems(source, task, 6):
            seen = problem.observations
            scaled = ((seen.values - problem.truth) / error)[seen.mask]
            assert scaled.abs().max() < 5.5
            assert abs(float(scaled.std()) - 1) < 0.2
            assert torch.equal(problem.background_sd, source.task_background_sd[task])
            assert problem.reset


def test_validation_is_not_augmented(source):
    for task in TASKS:
        for problem in problems(source, task, 5, validation=True):
            assert where(source, problem.truth)[1] in (0, 1)


def test_densities_are_log_uniform_between_their_bounds(plain):
    density = torch.stack(
        [p.observations.mask[0].float().mean() for p in problems(plain, PERSISTENCE)]
    )
    assert density.min() > 0.008
    assert density.max() < 0.108
    assert 0.35 < float((density < 0.1**1.5).float().mean()) < 0.65


def test_stated_errors_and_background_errors(source):
    labels = source.channels.labels
    stated = dict(zip(labels, source.error_sd[PERSISTENCE].tolist(), strict=True))
    assert_close(stated, {"z850": 50.0, "z500": 50.0, "t850": 0.7, "t500": 0.7})
    found = dict(zip(labels, source.task_background_sd[PERSISTENCE].tolist(), strict=True))
    assert 330 < found["z500"] < 460
    assert 230 < found["z850"] < 330
    assert 1.8 < found["t850"] < 2.8
    assert torch.equal(source.background_sd, source.task_background_sd[PERSISTENCE])
    spread = source.fields[1:, :2].double().var(0)
    expected = source.grid.area_mean(spread).mean(0).sqrt() / 2
    assert_close(source.error_sd[ENSEMBLE].double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(source.errors(ENSEMBLE), source.errors(ENSEMBLE))


class Watch(FreeRun):
    def __init__(self, members=1):
        super().__init__(members)
        self.seen = []

    def analyze(self, background, observations):
        self.seen.append(observations)
        return super().analyze(background, observations)


@pytest.mark.parametrize("task", TASKS)
def test_every_method_and_seed_sees_the_same_observations(source, task):
    single, ensemble = Watch(), Watch(9)
    at = EnsembleTask(task, DENSITY)
    for one, method in ((source, single), (Era5EnsembleSource(seed=5), ensemble)):
        one.square_errors(at, one.cases(task)[:3], method)
    for left, right in zip(single.seen, ensemble.seen, strict=True):
        assert torch.equal(left.values, right.values)
        assert torch.equal(left.errors, right.errors)
    masks = [seen.mask[0, 0] for seen in single.seen]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    assert all(abs(float(mask.float().mean()) - DENSITY) < 0.02 for mask in masks)


@pytest.mark.parametrize("task", TASKS)
def test_the_first_method_is_the_background(source, task):
    background = ensemble_methods(source, task)[0]
    assert background.name == "background"
    ticks, cases, at = [], source.cases(task), EnsembleTask(task, DENSITY)
    errors = source.square_errors(at, cases, background.build({}), lambda: ticks.append(1))
    assert len(ticks) == len(cases)
    expected = [source.grid.area_mean((c.background - c.truth).square()) for c in cases]
    assert torch.equal(errors, torch.stack(expected))
    worst = max(float((e.sqrt() / source.background_error(task)).mean()) for e in expected)
    assert_close(source.tuning_error(at, errors), worst)


def test_ensembles_are_scored_by_their_mean(source):
    case = source.cases(ENSEMBLE)[0]
    analysis = source.situation(EnsembleTask(ENSEMBLE, DENSITY), case, 9).analyze(FreeRun(9))
    assert_close(analysis, case.background)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (0.2, 0.1), (0.1, 1.5)])
def test_impossible_densities_are_refused(low, high, refused):
    refused(
        "0 < min_density <= max_density <= 1",
        Era5EnsembleSource,
        min_density=low,
        max_density=high,
        error=ValueError,
    )


def test_gates_are_compared_at_every_time_with_the_range_over_members():
    cases = [SimpleNamespace(time=time) for time in (1, 1, 0)]
    times = np.array(["2017-01-01T00", "2017-01-02T12"], dtype="datetime64[ns]")
    errors = {"adas_increment": torch.tensor([[4.0], [1.0], [9.0]]),
              "ungated": torch.tensor([[1.0], [4.0], [1.0]]), "oi": torch.ones(3, 1)}  # fmt: skip
    rows = gates_by_time("persistence/0.1", cases, times, errors, ["z500"])
    found = {(row.task, row.metric): (row.value, row.n) for row in rows}
    assert found == {
        ("persistence/0.1/2017-01-02T12", "over_ungated_z500"): (1.0, 2),
        ("persistence/0.1/2017-01-02T12", "over_ungated_z500_least_member"): (0.5, 2),
        ("persistence/0.1/2017-01-02T12", "over_ungated_z500_largest_member"): (2.0, 2),
        ("persistence/0.1/2017-01-01T00", "over_ungated_z500"): (3.0, 1),
        ("persistence/0.1/2017-01-01T00", "over_ungated_z500_least_member"): (3.0, 1),
        ("persistence/0.1/2017-01-01T00", "over_ungated_z500_largest_member"): (3.0, 1),
    }
    assert gates_by_time("x", cases, times, {"oi": errors["oi"]}, ["z500"]) == []
