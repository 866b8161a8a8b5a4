import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import DenseCovariance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.grid import gaussian_grid
from weather.metrics import DepartureSums, ensemble_signal
from weather.observations.gridded import GriddedObservations


def test_hand_calculated():
    values = torch.tensor([[[1.0, 4.0, 0.0]], [[2.0, 0.0, 0.0]]])
    errors = torch.tensor([[[1.0, 2.0, torch.inf]], [[0.5, torch.inf, torch.inf]]])
    background = torch.tensor([[[0.0, 1.0, 9.0]], [[0.0, torch.nan, 9.0]]])
    analysis = torch.tensor([[[1.0, 3.0, 9.0]], [[1.0, torch.nan, 9.0]]])
    sums = DepartureSums.of(background, analysis, GriddedObservations(values, errors))
    assert sums.number.tolist() == [2, 1]
    assert sums.background_bias().tolist() == [2, 2]
    assert_close(sums.background_rms(), torch.tensor([5.0, 4.0]).double().sqrt())
    assert sums.analysis_bias().tolist() == [0.5, 1]
    assert_close(sums.analysis_rms(), torch.tensor([0.5, 1.0]).double().sqrt())
    assert sums.desroziers_ratio().tolist() == [(0 * 1 + 1 * 3 / 4) / 2, 1 * 2 / 0.25]
    assert sums.signal().tolist() == [2 - 0.25, 1 - 4]


def test_sums_add_up_and_withstand_channels_without_observations():
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(3, 6, 2, 4, 8, generator=generator).double()
    errors = torch.full((6, 2, 4, 8), 2.0).double()
    errors[:, 1] = torch.inf
    observations = GriddedObservations(fields[2], errors)
    whole = DepartureSums.of(fields[0], fields[1], observations)
    parts = [
        DepartureSums.of(
            fields[0, part], fields[1, part], GriddedObservations(fields[2, part], errors[part])
        )
        for part in (slice(0, 2), slice(2, 6))
    ]
    for mine, theirs in zip(parts[0].plus(parts[1]), whole, strict=True):
        assert_close(mine, theirs)
    assert whole.background_rms()[1].isnan()


@pytest.fixture(scope="module")
def optimal():
    """Analyses of many draws whose errors are exactly as stated, and the method."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / 4
    draws = 4000
    truth = torch.zeros(draws, 1, 3, 4, dtype=torch.float64)
    background = (torch.randn(draws, 12, generator=generator).double() @ root.T / 2).view_as(truth)
    errors = torch.linspace(0.5, 3.0, 12).double().view(1, 3, 4)
    errors[0, 1, 1:3] = torch.inf
    errors = errors.expand_as(truth)
    noise = torch.randn(truth.shape, generator=generator).double()
    seen = errors.isfinite()
    observations = GriddedObservations(torch.where(seen, noise * errors, 0.0), errors)
    method = OptimalInterpolation(DenseCovariance(covariance))
    analysis = method.analyse(background[:, None], observations)[:, 0]
    return background, analysis, observations, method


def test_optimal_analyses_are_diagnosed_as_such(optimal):
    background, analysis, observations, method = optimal
    sums = DepartureSums.of(background, analysis, observations)
    assert sums.desroziers_ratio().item() == pytest.approx(1.0, abs=0.03)
    signal = method.degrees_of_freedom(observations.errors[0])
    assert sums.signal().item() / len(background) == pytest.approx(signal, abs=0.15)


def test_errors_that_are_stated_too_small_are_diagnosed(optimal):
    background, _, observations, method = optimal
    wrong = observations._replace(errors=observations.errors / 2)
    analysis = method.analyse(background[:, None], wrong)[:, 0]
    assert DepartureSums.of(background, analysis, wrong).desroziers_ratio().item() > 2


def test_signal_of_an_ensemble_is_the_trace_of_its_gain():
    generator = torch.Generator().manual_seed(2)
    background = torch.randn(1, 9, 2, 3, 4, generator=generator, dtype=torch.float64)
    errors = torch.full((1, 2, 3, 4), 0.7).double()
    errors[0, 1, 0] = torch.inf
    observations = GriddedObservations(torch.zeros_like(errors), errors)
    analysis = LETKF(gaussian_grid(3, 4), 9).analyse(background, observations)
    covariance = DenseCovariance(background[0].flatten(1).T.cov())
    expected = OptimalInterpolation(covariance).degrees_of_freedom(errors[0])
    signal = ensemble_signal(analysis, observations)
    assert signal.shape == (1, 2)
    assert signal.sum().item() == pytest.approx(expected, rel=1e-9)
