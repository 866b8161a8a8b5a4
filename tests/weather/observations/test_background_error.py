import pytest
import torch
from torch.testing import assert_close

from weather.observations.gridded import GriddedObservations, innovation_sd

FIRST = torch.tensor([100.0, 9.0, 8.0])
UNIT = FIRST[:, None, None]


def innovations(factor, density=0.1, problems=32):
    """Return a background whose errors are ``factor`` times the first guess, and observations."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(problems, 3, 32, 64, generator=draw) * 300 + 5000
    background = truth + factor * UNIT * torch.randn(truth.shape, generator=draw)
    errors = 0.1 * UNIT * torch.exp(3 * torch.rand(truth.shape, generator=draw) - 0.7)
    values = truth + errors * torch.randn(truth.shape, generator=draw)
    seen = torch.rand(problems, 1, 32, 64, generator=draw) < density
    return background, GriddedObservations.from_values(values, errors).withhold(seen)


@pytest.mark.parametrize("factor", [0.04, 0.1, 1.0, 3.0])
def test_the_factor_of_the_errors_is_found(factor):
    """Observations of very unlike quality: an unweighted mean would be useless at 0.04."""
    found = innovation_sd(*innovations(factor), FIRST)
    assert found.shape == (32, 3)
    ratio = found / (factor * FIRST)
    assert abs(float(ratio.mean()) - 1) < 0.05
    assert float(ratio.std()) < 0.3
    assert_close(ratio[:, 0], ratio[:, 2])  # one factor for all channels


def test_it_solves_its_equation():
    background, observations = innovations(0.5)
    found = innovation_sd(background.double(), observations, FIRST)
    variance = (found / FIRST)[:, 0].square()
    noise = (observations.errors / UNIT).double().square()
    square = ((observations.values - background) / UNIT).double().square()
    weight = (variance[:, None, None, None] + noise).pow(-2)
    excess = torch.where(observations.mask, weight * (square - noise), 0).sum((1, 2, 3))
    assert_close(excess / weight.sum((1, 2, 3)), variance, rtol=1e-3, atol=0)


def test_without_observations_the_first_guess_is_kept():
    background, observations = innovations(0.5, problems=2)
    observations = observations.withhold(torch.tensor([True, False])[:, None, None, None])
    found = innovation_sd(background, observations, FIRST)
    assert found[0, 0] < 0.7 * FIRST[0]
    assert torch.equal(found[1], FIRST)


def test_the_estimate_is_bounded():
    background, observations = innovations(0.0, problems=4)
    perfect = observations._replace(values=background * observations.mask)
    assert_close(innovation_sd(background, perfect, FIRST), (0.02 * FIRST).expand(4, 3))
    wild = observations._replace(values=observations.values * 1e6)
    assert_close(innovation_sd(background, wild, FIRST), (10 * FIRST).expand(4, 3))


def test_absent_cells_and_gradients_do_not_count():
    background, observations = innovations(0.5, problems=2)
    wild = torch.where(observations.mask, observations.values, torch.inf)
    found = innovation_sd(background.requires_grad_(), observations, FIRST)
    assert torch.equal(found, innovation_sd(background, observations._replace(values=wild), FIRST))
    assert not found.requires_grad
