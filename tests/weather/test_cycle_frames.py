"""Cycles of forecast models that start from two frames."""

import pytest
import torch
from torch.testing import assert_close

from weather.cycle import Cycle, FramesForecast, advance
from weather.observations.gridded import GriddedObservations

SHAPE = (2, 1, 1, 2, 4)  # B, M, C, H, W


class Extrapolation:
    """x + (x - previous); what it was given is recorded."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        self.given = []

    def __call__(self, states, hours, previous=None):
        self.given.append(previous)
        return 2 * states - (states if previous is None else previous)


class Halfway:
    """Moves the background half of the way to the observations."""

    members = 1

    def analyse(self, background, observations):
        return (background + observations.values[:, None]) / 2


def truth(count):
    return [torch.full((2, 1, 2, 4), float(t * t)) for t in range(count)]


def observed(count):
    return [GriddedObservations(x, torch.ones_like(x)) for x in truth(count)]


def test_the_last_two_analyses_start_the_forecast():
    model = Extrapolation()
    steps = list(Cycle(model, Halfway()).run(torch.zeros(SHAPE), observed(4)))
    analyses = [step.analysis for step in steps]
    assert model.given[0] is None
    for given, analysis in zip(model.given[1:], analyses, strict=False):
        assert_close(given, analysis.flatten(0, 1), rtol=0, atol=0)
    assert_close(steps[1].background, analyses[0])
    assert_close(steps[3].background, 2 * analyses[2] - analyses[1])
    assert not torch.equal(steps[3].background, analyses[2])


def test_a_cycle_goes_on_where_it_was_left():
    whole = list(Cycle(Extrapolation(), Halfway()).run(torch.zeros(SHAPE), observed(6)))
    last, before = whole[2].analysis, whole[1].analysis
    model = Extrapolation()
    background = advance(model, last.flatten(0, 1), 6.0, before.flatten(0, 1)).reshape(SHAPE)
    rest = list(Cycle(model, Halfway()).run(background, observed(6)[3:], previous=last))
    for one, other in zip(rest, whole[3:], strict=True):
        assert torch.equal(one.analysis, other.analysis)
    without = list(Cycle(model, Halfway()).run(background, observed(6)[3:]))
    assert not torch.equal(without[1].analysis, whole[4].analysis)


def test_what_a_caller_replaces_is_also_the_earlier_frame():
    model = Extrapolation()
    for number, step in enumerate(Cycle(model, Halfway()).run(torch.zeros(SHAPE), observed(3))):
        if number == 0:
            step.analysis[1] = 7.0
    assert float(model.given[1][1].max()) == 7.0


@pytest.mark.parametrize(("hours", "given"), [(6.0, True), (3.0, False), (12.0, False)])
def test_frames_of_another_distance_are_not_given(hours, given):
    model = Extrapolation()
    x = torch.ones(1, 1, 2, 4)
    advance(model, x, hours, x / 2)
    assert (model.given[0] is not None) is given


def test_models_of_one_state_are_called_with_one():
    calls = []

    def model(*arguments):
        calls.append(arguments)
        return arguments[0]

    assert not isinstance(model, FramesForecast)
    assert isinstance(Extrapolation(), FramesForecast)
    x = torch.ones(1, 1, 2, 4)
    advance(model, x, 6.0, x)
    assert [len(arguments) for arguments in calls] == [2]
