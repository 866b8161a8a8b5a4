"""Cycles of forecasts and analyses, of models of one state and of two."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from weather.baselines.assimilator import FreeRun, InverseDistance
from weather.baselines.covariance import SampleCovariance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.cycle import Cycle, FramesForecast, advance, diverged
from weather.grid import gaussian_grid
from weather.observations.gridded import GriddedObservations, gross_check
from weather.observations.simulated import bernoulli_network, observe

GRID = gaussian_grid(6, 12)


def forecast(states, hours):
    """Rotate eastwards, with a weak non-linearity."""
    assert states.ndim == 4
    return states.roll(1, -1) + hours / 60 * states.sin()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def optimal_interpolation():
    samples = torch.randn(30, 2, *GRID.shape, generator=generator(1))
    return OptimalInterpolation(SampleCovariance(samples, GRID, localization_km=3000.0))


METHODS = {
    "free run": FreeRun,
    "inverse distance": partial(InverseDistance, GRID),
    "optimal interpolation": optimal_interpolation,
    "letkf": partial(LETKF, GRID, 4, localization_km=3000.0, inflation=1.1, relaxation=0.3),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def start(members):
    return torch.randn(2, members, 2, *GRID.shape, generator=generator(2))


def observations(steps, *, error=0.1, absent=()):
    network = bernoulli_network(GRID, 0.5, seed=3)
    for step in range(steps):
        draw = generator(10 + step)
        truth = torch.randn(2, 2, *GRID.shape, generator=draw)
        seen = observe(truth, network, torch.full((2,), error), generator=draw)
        yield seen.withhold(torch.tensor(step not in absent))


def test_without_observations_the_cycle_is_the_free_run(method):
    first = start(method.members)
    nothing = observations(3, absent=range(3))
    states = first.flatten(0, 1)
    for number, step in enumerate(Cycle(forecast, method, 12.0).run(first, nothing)):
        states = states if number == 0 else forecast(states, 12.0)
        assert torch.equal(step.background, states.view_as(first))
        assert torch.equal(step.analysis, states.view_as(first))
    assert number == 2


def test_the_second_cycle_starts_from_the_first_analysis(method):
    first = start(method.members)
    seen = list(observations(2))
    without_first = [seen[0].withhold(torch.tensor(False)), seen[1]]
    cycle = Cycle(forecast, method)
    with_all, with_less = (list(cycle.run(first, each)) for each in (seen, without_first))
    expected = forecast(with_all[0].analysis.flatten(0, 1), 6.0)
    assert torch.equal(with_all[1].background, expected.view_as(first))
    same = torch.equal(with_all[1].analysis, with_less[1].analysis)
    assert same is isinstance(method, FreeRun)


def test_an_outage_is_a_pause_of_the_analysis(method):
    steps = list(Cycle(forecast, method).run(start(method.members), observations(4, absent=[2])))
    assert torch.equal(steps[2].analysis, steps[2].background)
    same = [torch.equal(step.analysis, step.background) for step in (steps[1], steps[3])]
    assert same == [isinstance(method, FreeRun)] * 2


def test_a_poisoned_observation_is_rejected_by_quality_control():
    first, method = start(1), optimal_interpolation()
    seen = list(observations(1, error=1.0))
    where = tuple(seen[0].mask.nonzero()[7].tolist())
    poisoned = seen[0]._replace(values=seen[0].values.clone())
    poisoned.values[where] = 1e6
    check = partial(gross_check, sigma_b=torch.ones(2), factor=8.0)
    clean = seen[0].withhold(
        torch.ones_like(seen[0].mask).index_put(
            tuple(torch.tensor(i) for i in where), torch.tensor(False)
        )
    )

    def analyse(given, **options):
        return next(iter(Cycle(forecast, method, **options).run(first, [given])))

    accepted = analyse(poisoned, quality_control=check)
    assert not accepted.observations.mask[where]
    assert accepted.observations.mask.sum() == seen[0].mask.sum() - 1
    assert torch.equal(accepted.analysis, analyse(clean).analysis)
    assert analyse(poisoned).analysis.abs().max() > 1e4


def test_the_mean_background_is_what_quality_control_sees():
    first = start(4)
    means = []

    def check(given, background):
        means.append(background)
        return given

    list(Cycle(forecast, FreeRun(4), quality_control=check).run(first, observations(1)))
    assert_close(means[0], first.mean(1))


def test_a_caller_may_replace_an_analysis():
    first = start(1)
    steps = Cycle(forecast, optimal_interpolation()).run(first, observations(2))
    next(steps).analysis[1] = 7.0
    background = next(steps).background
    assert torch.equal(background[1], forecast(torch.full_like(first[1], 7.0), 6.0))


def test_no_forecast_is_wasted():
    calls = []

    def counted(states, hours):
        calls.append((tuple(states.shape), hours))
        return states

    list(Cycle(counted, FreeRun(3), 3.0).run(start(3), observations(4)))
    assert calls == [((6, 2, *GRID.shape), 3.0)] * 3


def test_a_background_of_another_ensemble_size_is_refused():
    with pytest.raises(ValueError, match="works with 4 members"):
        next(Cycle(forecast, METHODS["letkf"]()).run(start(1), observations(1)))


def test_divergence_is_per_timeline():
    states = torch.zeros(5, 2, 4, 4)
    states[1, 0] = 1.4 * 3  # below the limit of the first channel
    states[2, 1] = -1.6 * 0.5
    states[3, 0, 0, 0] = torch.nan
    states[4, 1, 2, 1] = torch.inf
    sd = torch.tensor([3.0, 0.5])
    assert diverged(states, sd).tolist() == [False, False, True, True, True]
    assert diverged(states, sd, limit=1.0).tolist() == [False, True, True, True, True]


def test_observations_may_be_any_iterable_of_fields():
    absent = GriddedObservations.absent((2, 2, *GRID.shape))
    assert len(list(Cycle(forecast, FreeRun()).run(start(1), iter([absent] * 3)))) == 3
    assert list(Cycle(forecast, FreeRun()).run(start(1), [])) == []


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
