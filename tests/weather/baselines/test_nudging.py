import math

import pytest
import torch
from torch.testing import assert_close

from weather.baselines.assimilator import Nudging
from weather.baselines.covariance import gaspari_cohn
from weather.cycle import Cycle
from weather.grid import great_circle_km
from weather.observations.gridded import GriddedObservations


def still(states, hours):
    del hours
    return states.clone()


def decaying(states, hours):
    return states * math.exp(-hours / 10)


def everywhere(background, value=3.0, error=0.5):
    shape = (len(background), *background.shape[2:])
    values = torch.full(shape, value, dtype=background.dtype)
    return GriddedObservations(values, torch.full_like(values, error))


def test_observed_everywhere_the_departure_decays_in_closed_form(grid, problem):
    background, _ = problem()
    fields = everywhere(background)
    method = Nudging(grid, still, relaxation_hours=4.0, radius_km=1.0, hours=6.0, steps=3)
    first = method.analyse(background, fields)
    assert_close(first - 3, (background - 3) * math.exp(-2 / 4))  # no history: the last part alone
    second = method.analyse(first.clone(), fields)
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
    found = method.analyse(background, GriddedObservations(values, errors))
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
    found = method.analyse(background, GriddedObservations(values, errors))
    assert found[0, 0, 0, 2, 4] > 0  # as far from either
    swapped = method.analyse(background, GriddedObservations(-values, errors))
    assert_close(swapped, -found)


@pytest.mark.fault("weather outage")
def test_what_observes_nothing_or_is_lost_stays_exactly(grid, problem):
    background, observations = problem(timelines=3)
    keep = torch.tensor([True, False, True])[:, None, None, None]
    background[2, 0, 0, 0, 0] = torch.nan
    method = Nudging(grid, decaying)
    for _ in range(2):
        analysis = method.analyse(background, observations.withhold(keep))
        assert torch.equal(analysis[1], background[1])
        assert torch.equal(analysis[2].nan_to_num(7.0), background[2].nan_to_num(7.0))
        assert not torch.equal(analysis[0], background[0])
        background = decaying(analysis, 6.0)


def test_wrong_arguments_are_refused(grid):
    for name in ("relaxation_hours", "radius_km", "hours", "steps"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            Nudging(grid, still, **{name: 0})
