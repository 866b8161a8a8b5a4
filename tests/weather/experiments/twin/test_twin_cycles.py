"""Cycles of methods in a twin world, and the errors of their analyses."""

import math

import pytest
import torch
from torch.testing import assert_close

from weather.baselines.assimilator import FreeRun, SideBySide
from weather.experiments.twin.scenarios import fixed_tasks
from weather.experiments.twin.twin_cycles import TwinCycles, first_background, score_cycle, settled
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

    def analyze(self, background, observations):
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
        state = (state if number == 0 else forecast(state, 6.0)) + 0.01
        nothing = torch.zeros(B, C, H, W)
        assert_close(scores["analysis"][number], rmse(state.mean(1), nothing, WEIGHTS))
    assert not scores["lost"].any()
    assert set(scores) == {"analysis", "lost"}


@pytest.mark.parametrize("by", [torch.nan, torch.inf, 1.6 * 0.5])
def test_a_lost_timeline_stays_lost_and_the_others_are_not_touched(by):
    _, scores = score(Shift(at=2, by=by))
    _, untouched = score(Shift())
    assert scores["lost"].tolist() == [False, True, False]
    assert torch.equal(scores["analysis"][:, [0, 2]], untouched["analysis"][:, [0, 2]])
    assert scores["analysis"][3:].isfinite().all()  # the truth keeps the arithmetic going
    assert_close(scores["analysis"][3, 1], torch.full((C,), 0.03))  # forecast of the truth, 0.02
    assert not torch.isclose(scores["analysis"][2, 1], untouched["analysis"][2, 1]).any()


@pytest.mark.parametrize(("by", "guard"), [(50.0, False), (1.2 * 0.5, True)])
def test_a_free_run_and_what_is_below_the_limit_cannot_be_lost(by, guard):
    _, scores = score(Shift(at=2, by=by), guard=guard)
    assert not scores["lost"].any()
    assert (scores["analysis"][2:, 1] > 0.3 * by).all()


def test_lost_timelines_count_as_climatology():
    analysis = torch.rand(T, B, C, generator=torch.Generator().manual_seed(0))
    analysis[5, 1] = torch.nan
    lost = torch.tensor([False, True, False])
    error = settled({"analysis": analysis, "lost": lost}, SD)
    expected = analysis[3:].square().mean(0).sqrt()
    assert_close(error[[0, 2]], expected[[0, 2]])
    assert torch.equal(error[1], SD)


def test_the_first_third_does_not_count():
    analysis, lost = torch.ones(10, 1, C), torch.tensor([False])
    analysis[:3] = 100.0
    assert_close(settled({"analysis": analysis, "lost": lost}, SD), torch.ones(1, C))
    analysis[3] = 5.0
    expected = torch.full((1, C), (31 / 7) ** 0.5)
    assert_close(settled({"analysis": analysis, "lost": lost}, SD), expected)


class Watch:
    """Keeps the observations that it is given, and otherwise does what another method does."""

    members = 1

    def __init__(self, method):
        self.method, self.seen = method, []

    def analyze(self, background, observations):
        self.seen.append(observations)
        return self.method.analyze(background, observations)


SPARSE, SPARSER = fixed_tasks((0.3, 0.1))[:2]
IMPERFECT = fixed_tasks((0.3,))[1]


@pytest.fixture
def cycles(twin):
    return TwinCycles(twin.world, cycles=9)


@pytest.fixture
def interpolation(twin):
    method = next(m for m in twin.source().methods("0.3/perfect") if m.name == "oi")
    return method.build({"scale": 0.2, "length_km": 2000.0})


def test_the_ensemble_is_inflated_by_an_excess_over_one(twin):
    method = next(m for m in twin.source().methods("0.3/perfect") if m.name == "letkf")
    setting = {"length_km": 1000.0, "excess": 0.05, "relaxation": 0.5}
    assert method.build(setting).inflation == pytest.approx(1.05)


def test_every_method_sees_the_same_observations(cycles, interpolation):
    free, other = Watch(FreeRun()), Watch(interpolation)
    cycles.run(SPARSE, "free_run", free)
    cycles.run(IMPERFECT, "oi", other)
    assert len(free.seen) == len(other.seen) == 9
    for left, right in zip(free.seen, other.seen, strict=True):
        assert torch.equal(left.values, right.values)
        assert torch.equal(left.errors, right.errors)


def test_chosen_timelines_are_those_of_all(cycles, interpolation):
    together = cycles.run(SPARSE, "oi", interpolation)
    again = cycles.run(SPARSE, "oi", interpolation, rows=[1, 0, 1])
    assert_close(again["analysis"], together["analysis"][:, [1, 0, 1]], rtol=1e-4, atol=1e-4)
    errors, sd = settled(together, cycles.sd), cycles.sd
    free = settled(cycles.run(SPARSE, "free_run", FreeRun()), sd)
    assert (errors < free).all()
    wanted = float(
        (settled(cycles.run(SPARSE, "oi", interpolation, "choice"), sd) / sd).log().mean()
    )
    assert cycles.score(SPARSE, "oi", interpolation) == pytest.approx(math.exp(wanted))


def test_methods_side_by_side_share_a_cycle(cycles, interpolation, refuses):
    both = SideBySide([interpolation, FreeRun()])
    mixed = cycles.run(SPARSE, "oi", both, rows=[0, 1, 0, 1], verify=True)["analysis"]
    whole = cycles.run(SPARSE, "oi", interpolation)["analysis"]
    free = cycles.run(SPARSE, "free_run", FreeRun())["analysis"]
    assert_close(mixed[:, :2], whole, rtol=1e-4, atol=1e-4)
    assert_close(mixed[:, 2:], free)
    refuses(
        ValueError,
        (
            "1 timelines cannot be split evenly among 2 methods",
            lambda: cycles.run(SPARSE, "oi", both, rows=[1]),
        ),
        (
            r"one ensemble size, found \[1, 2\]",
            lambda: SideBySide([interpolation, FreeRun(members=2)]),
        ),
    )


def test_the_free_run_in_the_perfect_model_is_nature_late_by_a_day(cycles, twin):
    free = cycles.run(SPARSE, "free_run", FreeRun())["analysis"]
    states, weights = twin.world.states("test"), twin.world.grid.area_weights()
    expected = torch.stack([rmse(states[t], states[t + 4], weights) for t in range(9)])
    assert_close(free, expected)
    wrong = cycles.run(IMPERFECT, "free_run", FreeRun())["analysis"]
    assert (wrong[1:] > free[1:]).any()
    assert torch.equal(cycles.run(SPARSER, "free_run", FreeRun())["analysis"], free)


def test_tasks_and_their_forecasts(twin):
    tasks = twin.source().tasks((0.3, 0.1))
    assert [task.name for task in tasks] == ["0.3/perfect", "0.1/perfect", "0.3/error", "0.1/error"]
    models = [twin.world.forecast(task.model) for task in tasks]
    assert models == [twin.world.model] * 2 + [twin.world.imperfect] * 2


def test_ensembles_start_around_the_first_background(twin):
    first = first_background(twin.world, "test", 20)
    assert first.shape == (2, 20, 3, 16, 32)
    alone = first_background(twin.world, "test", 1)
    assert torch.equal(alone, twin.world.first_background("test"))
    assert_close(first.mean(1), alone[:, 0], rtol=1e-6, atol=1e-2)
    assert (first.std(1).mean((0, 2, 3)) > 0.1 * twin.world.climatological_sd()).all()
    assert not torch.equal(first[0, 0] - alone[0, 0], first[1, 0] - alone[1, 0])
    assert torch.equal(first, first_background(twin.world, "test", 20))
