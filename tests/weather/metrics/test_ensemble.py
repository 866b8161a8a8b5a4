import pytest
import torch
from torch.testing import assert_close

from weather.metrics import (
    crps,
    crps_skill,
    crps_spread,
    ensemble_mean_mse,
    ensemble_variance,
    rank_histogram,
    spread_skill_ratio,
    unbiased_mean_mse,
    unbiased_mean_rmse,
)


def test_golden(golden, same):
    fields = golden.members, golden.truth, golden.weights
    same(crps(*fields).mean(1), golden.wb2_crps)
    same(crps(*fields).mean(1), golden.wbx_crps)
    same(crps_skill(*fields).mean(1), golden.wb2_crps_skill)
    same(crps_spread(golden.members, golden.weights).mean(1), golden.wb2_crps_spread)
    same(ensemble_mean_mse(*fields).mean(1), golden.wb2_ensmean_mse)
    same(unbiased_mean_mse(*fields).mean(1), golden.wb2_debiased_ensmean_mse)
    same(ensemble_variance(golden.members, golden.weights).mean(1), golden.wb2_ensemble_variance)


def test_golden_spread_and_skill(golden, same):
    ensemble, truth = golden.members.transpose(1, 2), golden.truth.transpose(0, 1)  # time first
    assert golden.wbx_ssr.isnan().any()
    same(spread_skill_ratio(ensemble, truth, golden.weights), golden.wbx_ssr)
    same(unbiased_mean_rmse(ensemble, truth, golden.weights), golden.wbx_uemrmse)


def test_crps_spread_is_the_mean_over_pairs():
    ensemble = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    pairs = [(a - b).abs() for a in ensemble for b in ensemble]
    expected = torch.stack(pairs).sum(0).mean((-2, -1)) / 20
    assert_close(crps_spread(ensemble, torch.ones(3)), expected)


def test_crps_of_large_values_keeps_its_digits():
    small = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0)).mul(16).round() / 16
    weights = torch.ones(3)
    expected = crps_spread(small, weights)
    assert_close(crps_spread(small + 500_000, weights), expected, rtol=1e-4, atol=0)


def test_a_reliable_ensemble_has_a_ratio_of_one_and_flat_ranks():
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(200, 20, 40, generator=generator)
    ensemble = centre + torch.randn(7, 200, 20, 40, generator=generator)
    truth = centre + torch.randn(200, 20, 40, generator=generator)
    weights = torch.ones(20)
    assert spread_skill_ratio(ensemble, truth, weights) == pytest.approx(1.0, abs=0.01)
    ranks = rank_histogram(ensemble, truth, weights).mean(1)
    assert_close(ranks, torch.full((8,), 1 / 8), rtol=0, atol=0.003)


def test_ranks_count_members_below_and_share_ties():
    ensemble = torch.tensor([1.0, 2.0, 2.0, 5.0])[:, None, None]
    for truth, expected in (
        (0.0, [1, 0, 0, 0, 0]),
        (3.0, [0, 0, 0, 1, 0]),
        (9.0, [0, 0, 0, 0, 1]),
        (2.0, [0, 1 / 3, 1 / 3, 1 / 3, 0]),
    ):
        ranks = rank_histogram(ensemble, torch.full((1, 1), truth), torch.ones(1))
        assert_close(ranks, torch.tensor(expected, dtype=torch.float32))


def test_one_member_has_no_spread():
    with pytest.raises(ValueError, match="two members"):
        crps(torch.zeros(1, 2, 2), torch.zeros(2, 2), torch.ones(2))


@pytest.mark.fault("faults 6")
def test_half_precision_ensembles_are_scored_in_single_precision():
    ensemble = (torch.randn(5, 181, 360, generator=torch.Generator().manual_seed(0)) * 300).half()
    truth, weights = ensemble[0] / 2, torch.ones(181)
    for score in (crps, ensemble_mean_mse, unbiased_mean_mse):
        expected = score(ensemble.double(), truth.double(), weights)
        assert_close(score(ensemble, truth, weights).double(), expected, rtol=1e-4, atol=1e-2)
    spread = ensemble_variance(ensemble, weights).double()
    assert_close(spread, ensemble_variance(ensemble.double(), weights), rtol=1e-4, atol=1e-2)


@pytest.mark.fault("faults 8")
def test_a_rank_histogram_of_a_missing_truth_is_missing():
    ensemble = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    truth = ensemble[0].clone()
    truth[1, 2, 3] = torch.nan
    shares = rank_histogram(ensemble, truth, torch.ones(6))
    assert shares[:, 1].isnan().all()
    assert_close(shares[:, [0, 2]].sum(0), torch.ones(2))
    ensemble[2, 0, 0, 0] = torch.nan
    assert rank_histogram(ensemble, truth, torch.ones(6))[:, 0].isnan().all()
    outside = torch.ones(6, 8)
    outside[2, 3] = 0  # where the weight is zero nothing matters
    assert not rank_histogram(ensemble, truth, outside)[:, 1].isnan().any()
