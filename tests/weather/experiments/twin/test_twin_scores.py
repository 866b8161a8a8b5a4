"""Scores of cycles in a twin world, and of analyses of corrupted reports."""

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from weather.baselines.assimilator import FreeRun, SideBySide
from weather.experiments.twin.twin_tasks import (
    CycleScores,
    TwinEvaluation,
    TwinTask,
    score_cycle,
    settled,
)
from weather.metrics import rmse
from weather.observations.gridded import GriddedObservations

T, B, C, H, W = 9, 3, 2, 4, 6
WEIGHTS = torch.tensor([0.5, 1.5, 1.5, 0.5])
SD = torch.tensor([2.0, 0.5])


def forecast(states, hours):
    return states * 0.9 + hours / 300


class Shift:
    """Moves the ensemble by ``step``; at cycle ``at`` it throws one timeline away."""

    def __init__(self, members=1, at=None, by=torch.nan):
        self.members, self.at, self.by, self.calls = members, at, by, 0

    def analyse(self, background, observations):
        analysis = background + 0.01
        if self.calls == self.at:
            analysis[1] += self.by
        self.calls += 1
        return analysis


def score(assimilator, **options):
    draw = torch.Generator().manual_seed(1)
    truth = torch.zeros(T, B, C, H, W)
    first = 0.1 * torch.randn(B, assimilator.members, C, H, W, generator=draw)
    absent = [GriddedObservations.absent((B, C, H, W)) for _ in range(T)]
    options = {"area_weights": WEIGHTS, "climatological_sd": SD} | options
    return first, score_cycle(forecast, assimilator, first, truth, absent, **options)


@pytest.mark.parametrize("members", [1, 5])
def test_scores_are_the_errors_of_the_ensemble_mean(members):
    first, scores = score(Shift(members))
    state = first
    for number in range(T):
        state = state if number == 0 else forecast(state, 6.0)
        nothing = torch.zeros(B, C, H, W)
        assert_close(scores.background[number], rmse(state.mean(1), nothing, WEIGHTS))
        state = state + 0.01
        assert_close(scores.analysis[number], rmse(state.mean(1), nothing, WEIGHTS))
        if members > 1:
            variance = (state.var(1) * WEIGHTS[:, None]).mean((-2, -1))
            assert_close(scores.spread[number], variance.sqrt())
    assert not scores.lost.any()
    assert scores.analysis.shape == scores.spread.shape == (T, B, C)
    assert bool((scores.spread > 0).all()) is (members > 1)


@pytest.mark.parametrize("by", [torch.nan, torch.inf, 1.6 * 0.5])
def test_a_lost_timeline_stays_lost_and_the_others_are_not_touched(by):
    _, scores = score(Shift(at=2, by=by))
    _, untouched = score(Shift())
    assert scores.lost.tolist() == [False, True, False]
    assert torch.equal(scores.analysis[:, [0, 2]], untouched.analysis[:, [0, 2]])
    assert scores.analysis[3:].isfinite().all()  # the truth keeps the arithmetic going
    assert_close(scores.background[3, 1], torch.full((C,), 0.02))  # forecast of the truth, 0
    assert not torch.isclose(scores.analysis[2, 1], untouched.analysis[2, 1]).any()


def test_below_the_limit_nothing_is_lost():
    _, scores = score(Shift(at=2, by=1.2 * 0.5))
    assert not scores.lost.any()


def test_a_free_run_cannot_be_lost():
    _, scores = score(Shift(at=2, by=50.0), guard=False)
    assert not scores.lost.any()
    assert (scores.analysis[2:, 1] > 10).all()


def scores_of(analysis, lost):
    return CycleScores(analysis, analysis, torch.zeros_like(analysis), torch.tensor(lost))


def test_lost_timelines_are_scored_as_the_free_run():
    analysis = torch.rand(T, B, C, generator=torch.Generator().manual_seed(0))
    analysis[5, 1] = torch.nan
    free = scores_of(10 + analysis.nan_to_num(), [False] * B)
    error = settled(scores_of(analysis, [False, True, False]), free)
    expected = analysis[3:].square().mean(0).sqrt()
    assert_close(error[[0, 2]], expected[[0, 2]])
    assert torch.equal(error[1], settled(free)[1])
    assert error.isfinite().all()
    with pytest.raises(ValueError, match="1 timelines, but a free run of 3"):
        settled(scores_of(analysis[:, :1], [True]), free)


def test_the_first_third_does_not_count():
    analysis = torch.ones(10, 1, C)
    analysis[:3] = 100.0
    assert_close(settled(scores_of(analysis, [False])), torch.ones(1, C))
    analysis[3] = 5.0
    assert_close(settled(scores_of(analysis, [False])), torch.full((1, C), (31 / 7) ** 0.5))


class Watch:
    """Keeps the observations that it is given, and otherwise does what another method does."""

    members = 1

    def __init__(self, method):
        self.method, self.seen = method, []

    def analyse(self, background, observations):
        self.seen.append(observations)
        return self.method.analyse(background, observations)


class Explode:
    members = 1

    def analyse(self, background, observations):
        return background * torch.inf


@pytest.fixture
def evaluation(twin):
    return TwinEvaluation(twin.world, (0.3, 0.1), cycles=9)


def test_every_method_sees_the_same_observations(evaluation):
    perfect, error = TwinTask(0.3, "perfect"), TwinTask(0.3, "error")
    free = Watch(FreeRun())
    oi = next(m for m in evaluation.classical() if m.name == "oi")
    interpolation = Watch(oi.build({"scale": 0.2, "length_km": 2000.0}))
    evaluation.run(perfect, free)
    evaluation.run(error, interpolation)
    assert len(free.seen) == len(interpolation.seen) == 9
    for left, right in zip(free.seen, interpolation.seen, strict=True):
        assert torch.equal(left.values, right.values)
        assert torch.equal(left.errors, right.errors)


def test_chosen_timelines_are_those_of_all(evaluation):
    task = TwinTask(0.3, "perfect")
    oi = next(m for m in evaluation.classical() if m.name == "oi")
    method = oi.build({"scale": 0.2, "length_km": 2000.0})
    together = evaluation.run(task, method)
    again = evaluation.run(task, method, timelines=[1, 0, 1])
    assert again.timelines.tolist() == [1, 0, 1]
    assert_close(again.analysis, together.analysis[:, [1, 0, 1]], rtol=1e-4, atol=1e-4)
    assert_close(again.rows(torch.tensor([1])).analysis, again.analysis[:, 1:2])
    errors = evaluation.error(task, again)
    assert_close(errors, evaluation.error(task, together)[[1, 0, 1]], rtol=1e-4, atol=1e-4)
    assert (
        evaluation.error(task, together) < evaluation.error(task, evaluation.run(task, FreeRun()))
    ).all()
    with pytest.raises(GatesError, match="timeline 3 of 2 in the test period"):
        evaluation.run(task, method, timelines=[0, 2])


def test_methods_side_by_side_share_a_cycle(evaluation):
    task = TwinTask(0.3, "perfect")
    oi = next(m for m in evaluation.classical() if m.name == "oi")
    method = oi.build({"scale": 0.2, "length_km": 2000.0})
    both = SideBySide([method, FreeRun()])
    mixed = evaluation.run(task, both, verify=True, timelines=[0, 1, 0, 1])
    whole, free = evaluation.run(task, method), evaluation.free_run(task)
    assert_close(mixed.analysis[:, :2], whole.analysis, rtol=1e-4, atol=1e-4)
    assert_close(mixed.analysis[:, 2:], free.analysis)
    with pytest.raises(ValueError, match="1 timelines cannot be split evenly among 2 methods"):
        evaluation.run(task, both, timelines=[1])
    with pytest.raises(ValueError, match=r"one ensemble size, found \[1, 2\]"):
        SideBySide([method, FreeRun(members=2)])


def test_the_free_run_in_the_perfect_model_is_nature_late_by_a_day(evaluation, twin):
    free = evaluation.free_run(TwinTask(0.3, "perfect"))
    states, weights = twin.world.states("test"), twin.world.grid.area_weights()
    expected = torch.stack([rmse(states[t], states[t + 4], weights) for t in range(9)])
    assert_close(free.background, expected)
    assert torch.equal(free.background, free.analysis)
    wrong = evaluation.free_run(TwinTask(0.3, "error"))
    assert (wrong.analysis[1:] > free.analysis[1:]).any()
    assert evaluation.free_run(TwinTask(0.1, "perfect")) is free  # observations do not matter


def test_an_exploding_method_is_scored_as_the_free_run(evaluation):
    for period in ("test", "tuning"):
        task = TwinTask(0.1, "error")
        scores = evaluation.run(task, Explode(), period)
        assert scores.lost.all()
        free = settled(evaluation.free_run(task, period))
        assert torch.equal(evaluation.error(task, scores, period), free)
    one = evaluation.run(task, Explode(), timelines=[1])
    assert_close(evaluation.error(task, one), settled(evaluation.free_run(task))[1:])
    worst = (settled(evaluation.free_run(task, "tuning")) / evaluation.climatological_sd).mean(1)
    assert_close(evaluation.tuning_score(task, Explode()), float(worst.max()))


def test_tasks_and_their_forecasts(evaluation, twin):
    names = [task.name for task in evaluation.tasks]
    assert names == ["0.3/perfect", "0.1/perfect", "0.3/error", "0.1/error"]
    models = [evaluation.forecast(task) for task in evaluation.tasks]
    assert models == [twin.world.model] * 2 + [twin.world.imperfect] * 2


def test_ensembles_start_around_the_first_background(evaluation, twin):
    first = evaluation.methods.first_background("test", 20)
    assert first.shape == (2, 20, 3, 16, 32)
    alone = evaluation.methods.first_background("test", 1)
    assert torch.equal(alone, twin.world.first_background("test"))
    assert_close(first.mean(1), alone[:, 0], rtol=1e-6, atol=1e-2)
    assert (first.std(1).mean((0, 2, 3)) > 0.1 * evaluation.climatological_sd).all()
    assert not torch.equal(first[0, 0] - alone[0, 0], first[1, 0] - alone[1, 0])
    assert torch.equal(first, evaluation.methods.first_background("test", 20))
