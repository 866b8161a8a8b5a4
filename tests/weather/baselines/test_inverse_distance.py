import math

import pytest
import torch
from torch.testing import assert_close

from weather.baselines.assimilator import InverseDistance
from weather.grid import great_circle_km, regular_grid
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import observe


@pytest.mark.parametrize("of", ["innovations", "observations"])
def test_observed_points_take_the_observation(problem, grid, of):
    background, observations = problem(members=2)
    analysis = InverseDistance(grid, of=of, members=2).analyse(background, observations)
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
        return method.analyse(background, observations)[0, 0, 0, 3, 4]

    assert_close(at(of="observations"), (3 * w1 - w2) / (w1 + w2))
    assert_close(at(), 2 + (1 * w1 - 3 * w2) / (w1 + w2))
    assert_close(at(background_km=1500.0), 2 + (1 * w1 - 3 * w2) / (w1 + w2 + w0))


def test_channels_do_not_share_observations(problem, grid):
    background, observations = problem(channels=2)
    keep = torch.tensor([True, False])[:, None, None]
    for of in ("innovations", "observations"):
        method = InverseDistance(grid, of=of)
        one = method.analyse(background, observations.withhold(keep))
        assert torch.equal(one[:, :, 1], background[:, :, 1])
        both = method.analyse(background, observations)
        assert_close(one[:, :, 0], both[:, :, 0], rtol=0, atol=1e-12)


def test_without_observations_the_background_is_kept_exactly(problem, grid):
    background, observations = problem()
    nothing = observations.withhold(torch.tensor(False))
    for of in ("innovations", "observations"):
        assert torch.equal(InverseDistance(grid, of=of).analyse(background, nothing), background)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "guesses"}, "unknown"),
        ({"power": 0.0}, "positive"),
        ({"background_km": -1.0}, "positive"),
        ({"of": "observations", "background_km": 500.0}, "no meaning"),
    ],
)
def test_bad_arguments(grid, options, message):
    assert InverseDistance(grid, of="observations", background_km=math.inf).members == 1
    with pytest.raises(ValueError, match=message):
        InverseDistance(grid, **options)


@pytest.mark.parametrize("of", ["innovations", "observations"])
def test_weights_that_are_applied_piece_by_piece_are_the_same(of, monkeypatch):
    grid = regular_grid(8, 12, poles=True)
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 2, 8, 12, generator=draw)
    network = torch.rand(2, 8, 12, generator=draw) < 0.4
    observations = observe(truth, network, torch.ones(2), generator=draw)
    background = torch.randn(1, 1, 2, 8, 12, generator=draw)
    options = {} if of == "observations" else {"background_km": 800.0}
    whole = InverseDistance(grid, of=of, **options).analyse(background, observations)
    monkeypatch.setattr("weather.baselines.assimilator._MATRIX_BYTES", 0)
    method = InverseDistance(grid, of=of, **options)
    torch.testing.assert_close(method.analyse(background, observations), whole)
    assert method._zonal is not None
