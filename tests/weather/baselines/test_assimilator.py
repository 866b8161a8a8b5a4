"""Methods without covariances: none at all, inverse distance, nudging."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from weather import Cycle, GriddedObservations
from weather.baselines import Climatology, FreeRun, InverseDistance, Nudging, Persistence
from weather.baselines.covariance import gaspari_cohn
from weather.grid import great_circle_km, regular_grid
from weather.observations.simulated import observe


def test_what_they_return(problem):
    background, observations = problem(timelines=2)
    mean = torch.rand(2, 6, 12)
    climatology = Climatology(mean).analyze(background, observations)
    assert torch.equal(climatology, torch.stack([mean, mean])[:, None].to(background))
    persistence = Persistence()
    assert torch.equal(persistence.analyze(background, observations), background)
    assert torch.equal(persistence.analyze(background + 1, observations), background)
    assert torch.equal(FreeRun().analyze(background, observations), background)


def test_results_are_free_to_be_changed(problem):
    background, observations = problem(timelines=2)
    kept = background.clone()
    mean = torch.zeros(2, 6, 12, dtype=torch.float64)
    persistence = Persistence()
    for method in (FreeRun(), Climatology(mean), persistence, persistence):
        method.analyze(background, observations)[0] = 1.0
    assert torch.equal(background, kept)
    assert torch.equal(persistence.analyze(background, observations), kept)
    assert not mean.any()


@pytest.mark.parametrize("of", ["innovations", "observations"])
def test_observed_points_take_the_observation(problem, grid, of):
    background, observations = problem(members=2)
    analysis = InverseDistance(grid, of=of, members=2).analyze(background, observations)
    mask = observations.mask
    for member in range(2):
        assert_close(analysis[:, member][mask], observations.values[mask], rtol=0, atol=1e-6)


def two_observations(grid):
    errors = torch.full((1, 1, *grid.shape), torch.inf, dtype=torch.float64)
    values = torch.zeros_like(errors)
    for where, value in (((1, 2), 3.0), ((4, 9), -1.0)):
        errors[(0, 0, *where)], values[(0, 0, *where)] = 1.0, value
    distance = [
        great_circle_km(grid.latitude[i], grid.longitude[j], grid.latitude[3], grid.longitude[4])
        for i, j in ((1, 2), (4, 9))
    ]
    return GriddedObservations(values, errors), distance


def test_closed_form_of_two_observations(grid):
    observations, (near, far) = two_observations(grid)
    background = torch.full((1, 1, 1, *grid.shape), 2.0, dtype=torch.float64)
    w1, w2, w0 = near**-3, far**-3, 1500.0**-3

    def at(**options):
        method = InverseDistance(grid, power=3.0, **options)
        return method.analyze(background, observations)[0, 0, 0, 3, 4]

    assert_close(at(of="observations"), (3 * w1 - w2) / (w1 + w2))
    assert_close(at(), 2 + (1 * w1 - 3 * w2) / (w1 + w2))
    assert_close(at(background_km=1500.0), 2 + (1 * w1 - 3 * w2) / (w1 + w2 + w0))


def test_channels_do_not_share_observations(problem, grid):
    background, observations = problem(channels=2)
    keep = torch.tensor([True, False])[:, None, None]
    for of in ("innovations", "observations"):
        method = InverseDistance(grid, of=of)
        one = method.analyze(background, observations.withhold(keep))
        assert torch.equal(one[:, :, 1], background[:, :, 1])
        both = method.analyze(background, observations)
        assert_close(one[:, :, 0], both[:, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (InverseDistance, {"of": "guesses"}, "unknown"),
        (InverseDistance, {"power": 0.0}, "positive"),
        (InverseDistance, {"background_km": -1.0}, "positive"),
        (InverseDistance, {"of": "observations", "background_km": 500.0}, "no meaning"),
        (
            partial(Nudging, forecast=None),
            {"relaxation_hours": 0},
            "relaxation_hours must be positive, got 0",
        ),
        (partial(Nudging, forecast=None), {"radius_km": 0}, "radius_km must be positive, got 0"),
        (partial(Nudging, forecast=None), {"hours": 0}, "hours must be positive, got 0"),
        (partial(Nudging, forecast=None), {"steps": 0}, "steps must be positive, got 0"),
    ],
)
def test_bad_arguments(grid, method, options, message, refused):
    refused(message, method, grid, **options, error=ValueError)


@pytest.mark.parametrize("of", ["innovations", "observations"])
def test_weights_that_are_applied_piece_by_piece_are_the_same(of, monkeypatch):
    grid = regular_grid(8, 12, poles=True)
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 2, 8, 12, generator=draw)
    network = torch.rand(2, 8, 12, generator=draw) < 0.4
    observations = observe(truth, network, torch.ones(2), generator=draw)
    background = torch.randn(1, 1, 2, 8, 12, generator=draw)
    options = {} if of == "observations" else {"background_km": 800.0}
    whole = InverseDistance(grid, of=of, **options).analyze(background, observations)
    monkeypatch.setattr("weather.baselines.assimilator._MATRIX_BYTES", 0)
    method = InverseDistance(grid, of=of, **options)
    torch.testing.assert_close(method.analyze(background, observations), whole)
    assert method._zonal is not None


def still(states, hours):
    return states.clone()


def decaying(states, hours):
    return states * math.exp(-hours / 10)


def everywhere(background, value=3.0, error=0.5):
    values = torch.full((len(background), *background.shape[2:]), value, dtype=background.dtype)
    return GriddedObservations(values, torch.full_like(values, error))


def test_observed_everywhere_the_departure_decays_in_closed_form(grid, problem):
    background, _ = problem()
    fields = everywhere(background)
    method = Nudging(grid, still, relaxation_hours=4.0, radius_km=1.0, hours=6.0, steps=3)
    first = method.analyze(background, fields)
    assert_close(first - 3, (background - 3) * math.exp(-2 / 4))  # no history: the last part alone
    second = method.analyze(first.clone(), fields)
    expected = (first - 3) * math.exp(-(1 / 3 + 2 / 3 + 1) * 2 / 4)
    assert_close(second - 3, expected)


def test_the_model_runs_between_the_parts(grid, problem):
    background, _ = problem(timelines=1)
    fields = everywhere(background, value=0.0)
    method = Nudging(grid, decaying, relaxation_hours=4.0, radius_km=1.0, hours=6.0, steps=2)
    steps = list(Cycle(decaying, method).run(background, [fields, fields]))
    nudged = math.exp(-0.5 * 3 / 4) * math.exp(-3 / 4)
    assert_close(steps[1].analysis, steps[0].analysis * math.exp(-6 / 10) * nudged)


def test_one_observation_is_spread_by_the_taper(grid, problem):
    background, _ = problem(timelines=1)
    values = torch.zeros(1, 2, 6, 12, dtype=torch.float64)
    errors = torch.full_like(values, torch.inf)
    values[0, 1, 2, 3], errors[0, 1, 2, 3] = 5.0, 0.1
    method = Nudging(grid, still, relaxation_hours=3.0, radius_km=2500.0, steps=1)
    found = method.analyze(background, GriddedObservations(values, errors))
    distance = great_circle_km(
        grid.latitude[2], grid.longitude[3], grid.latitude[:, None], grid.longitude
    )
    weight = (1 - math.exp(-2)) * gaspari_cohn(distance / 2500.0)
    expected = background.clone()
    expected[0, 0, 1] += weight * (5.0 - background[0, 0, 1, 2, 3])
    assert_close(found, expected)


def test_of_two_observations_the_more_precise_counts_more(grid):
    background = torch.zeros(1, 1, 1, 6, 12, dtype=torch.float64)
    values = torch.zeros(1, 1, 6, 12, dtype=torch.float64)
    errors = torch.full_like(values, torch.inf)
    values[0, 0, 2, 3], errors[0, 0, 2, 3] = 1.0, 1.0
    values[0, 0, 2, 5], errors[0, 0, 2, 5] = -1.0, 2.0
    method = Nudging(grid, still, radius_km=3000.0, steps=1)
    found = method.analyze(background, GriddedObservations(values, errors))
    assert found[0, 0, 0, 2, 4] > 0  # as far from either
    assert_close(method.analyze(background, GriddedObservations(-values, errors)), -found)


@pytest.mark.fault("weather outage")
def test_what_observes_nothing_or_is_lost_stays_exactly(grid, problem):
    background, observations = problem(timelines=3)
    keep = torch.tensor([True, False, True])[:, None, None, None]
    background[2, 0, 0, 0, 0] = torch.nan
    method = Nudging(grid, decaying)
    for _ in range(2):
        analysis = method.analyze(background, observations.withhold(keep))
        assert torch.equal(analysis[1], background[1])
        assert torch.equal(analysis[2].nan_to_num(7.0), background[2].nan_to_num(7.0))
        assert not torch.equal(analysis[0], background[0])
        background = decaying(analysis, 6.0)
