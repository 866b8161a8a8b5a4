import pytest
import torch
from torch.testing import assert_close

from weather.baselines.letkf import ensemble_weights

EXACT = {"rtol": 0, "atol": 1e-9}


def transform(weights):
    """The symmetric W of Hunt et al. (2007), equation 24."""
    return (weights.vectors * weights.shrink) @ weights.vectors.mT


def test_golden(golden_filter, etkf):
    vectors = golden_filter[0]
    states = vectors["X"].T
    observed = states[:, vectors["obs_index"]]
    errors = vectors["R_diag"].sqrt()
    inflation = vectors["infl"].item()
    analysis = etkf(states, observed, vectors["y"], errors, inflation=inflation)
    assert_close(analysis.T, vectors["etkf_Xa"], **EXACT)
    scaled = (observed - observed.mean(0)) / errors
    innovation = (vectors["y"] - observed.mean(0)) / errors
    weights = ensemble_weights(scaled @ scaled.T, scaled @ innovation, inflation)
    assert_close(weights.vectors @ weights.shift, vectors["etkf_wmean"], **EXACT)
    assert_close(transform(weights), vectors["etkf_W"], **EXACT)


def ensemble(seed=0, members=30, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(members, size, generator=generator, dtype=torch.float64)


def test_mean_and_covariance_are_those_of_the_kalman_filter(etkf):
    states, operator = ensemble(), torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, -1]]).double()
    values, errors = torch.tensor([0.5, -2.0]).double(), torch.tensor([0.3, 2.0]).double()
    analysis = etkf(states, states @ operator.T, values, errors)
    prior = states.T.cov()
    innovation = operator @ prior @ operator.T + errors.square().diag()
    gain = prior @ operator.T @ innovation.inverse()
    mean = states.mean(0) + gain @ (values - operator @ states.mean(0))
    assert_close(analysis.mean(0), mean, **EXACT)
    assert_close(analysis.T.cov(), prior - gain @ operator @ prior, **EXACT)


def test_the_order_of_the_observations_does_not_matter(etkf):
    states = ensemble()
    values, errors = torch.randn(4).double(), torch.rand(4).double() + 0.1
    order = torch.tensor([2, 0, 3, 1])
    analysis = etkf(states, states, values, errors)
    assert_close(etkf(states, states[:, order], values[order], errors[order]), analysis, **EXACT)


def test_an_observation_with_an_infinite_error_is_none(etkf):
    states = ensemble()
    errors = torch.tensor([1.0, torch.inf, 0.5, torch.inf]).double()
    values = torch.tensor([0.3, 1e9, -1.0, torch.nan]).double()
    seen = torch.tensor([0, 2])
    expected = etkf(states, states[:, seen], values[seen], errors[seen])
    assert_close(etkf(states, states, values, errors), expected, **EXACT)


def test_rounding_below_zero_is_no_information():
    signal = torch.diag(torch.tensor([-50.0, 0.0, 3.0]))
    weights = ensemble_weights(signal, torch.zeros(3), inflation=1.0)
    expected = torch.diag(torch.tensor([1.0, 1.0, (2 / 5) ** 0.5], dtype=torch.float64))
    assert_close(transform(weights), expected, rtol=0, atol=1e-7)


@pytest.mark.fault("faults 7")
def test_one_member_is_no_ensemble(etkf):
    states = ensemble(members=1)
    with pytest.raises(ValueError, match="at least two members, found 1"):
        etkf(states, states, torch.zeros(4), torch.ones(4))
