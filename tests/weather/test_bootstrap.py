import math

import pytest
import torch

from weather.bootstrap import (
    clustered_bootstrap,
    moving_block_bootstrap,
    root,
    root_difference,
    root_ratio,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_independent_samples_have_the_normal_interval():
    values = torch.randn(400, generator=generator())
    result = clustered_bootstrap(values, torch.arange(400))
    half = 1.96 * values.std().item() / 20
    assert result.value == pytest.approx(values.mean().item(), abs=1e-6)
    assert result.units == 400
    assert result.low == pytest.approx(result.value - half, abs=0.1 * half)
    assert result.high == pytest.approx(result.value + half, abs=0.1 * half)


def test_copies_within_a_cluster_bring_no_certainty():
    values = torch.randn(30, generator=generator())
    alone = clustered_bootstrap(values, torch.arange(30))
    copies = clustered_bootstrap(
        values.repeat_interleave(50), torch.arange(30).repeat_interleave(50)
    )
    assert copies.units == 30
    assert copies.low == pytest.approx(alone.low)
    assert copies.high == pytest.approx(alone.high)
    naive = clustered_bootstrap(values.repeat_interleave(50), torch.arange(1500))
    assert naive.high - naive.low < 0.3 * (alone.high - alone.low)


def test_clusters_of_different_size_weigh_by_their_samples():
    values = torch.tensor([1.0, 1.0, 1.0, 5.0])
    result = clustered_bootstrap(values, torch.tensor([7, 7, 7, 2]), level=0.98)
    assert (result.value, result.low, result.high, result.units) == (2.0, 1.0, 5.0, 2)
    # Half of the draws take both clusters, whose samples have the mean 2.
    middle = clustered_bootstrap(values, torch.tensor([7, 7, 7, 2]), level=0.3)
    assert (middle.low, middle.high) == (2.0, 2.0)


def test_transforms_act_on_resampled_means():
    squares = torch.rand(100, 2, generator=generator()) + torch.tensor([1.0, 2.0])
    clusters = torch.arange(100) // 5
    mean = squares.double().mean(0)
    difference = clustered_bootstrap(squares, clusters, transform=root_difference)
    assert difference.value == pytest.approx((mean[0].sqrt() - mean[1].sqrt()).item())
    assert difference.low < difference.value < difference.high < 0
    ratio = clustered_bootstrap(squares, clusters, transform=root_ratio)
    assert ratio.value == pytest.approx((mean[0] / mean[1]).sqrt().item())
    single = clustered_bootstrap(squares[:, :1], clusters, transform=root)
    plain = clustered_bootstrap(squares[:, 0], clusters)
    assert single.low == pytest.approx(plain.low**0.5)


def test_pairs_are_resampled_together():
    common = 10 * torch.rand(50, generator=generator())
    pairs = torch.stack([common + 1, common], 1)
    result = clustered_bootstrap(
        pairs, torch.arange(50), transform=lambda moments: moments[..., 0] - moments[..., 1]
    )
    assert result.low == pytest.approx(1.0)
    assert result.high == pytest.approx(1.0)


def test_draws_depend_on_the_seed_alone():
    values, clusters = torch.randn(40, generator=generator()), torch.arange(40) // 4
    torch.manual_seed(1)
    first = clustered_bootstrap(values, clusters, seed=5)
    torch.manual_seed(2)
    assert clustered_bootstrap(values, clusters, seed=5) == first
    assert clustered_bootstrap(values, clusters, seed=6) != first
    series = moving_block_bootstrap(values, 4, seed=5)
    assert moving_block_bootstrap(values, 4, seed=5) == series
    assert moving_block_bootstrap(values, 4, seed=6) != series


def test_one_cluster_tells_nothing():
    result = clustered_bootstrap(torch.randn(9), torch.zeros(9))
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert result.units == 1


def test_coverage_of_clusters():
    draws = generator(3)
    inside = 0
    for seed in range(200):
        means = torch.randn(25, 1, generator=draws)
        values = (means + 0.3 * torch.randn(25, 4, generator=draws)).flatten()
        clusters = torch.arange(25).repeat_interleave(4)
        result = clustered_bootstrap(values, clusters, resamples=500, seed=seed)
        inside += result.low <= 0 <= result.high
    assert 0.88 < inside / 200 < 0.99


def autoregressive(length, coefficient, draws):
    value, series = torch.zeros(()), []
    for shock in torch.randn(length, generator=draws):
        value = coefficient * value + shock
        series.append(value)
    return torch.stack(series)


def test_blocks_widen_the_interval_of_a_persistent_series():
    series = autoregressive(2000, 0.8, generator())
    narrow = moving_block_bootstrap(series, 1)
    wide = moving_block_bootstrap(series, 50)
    expected = series.std() * 3 / 2000**0.5  # the factor of a first-order process is 3
    assert (wide.high - wide.low) / (2 * 1.96) == pytest.approx(expected.item(), rel=0.25)
    assert (narrow.high - narrow.low) * 2 < wide.high - wide.low
    assert wide.units == 40


def test_blocks_are_of_successive_values_and_fill_the_series():
    trend = torch.arange(10.0)
    result = moving_block_bootstrap(trend, 4, level=0.999, resamples=5000)
    # The least mean takes the first blocks 0..3, 0..3 and 0..1, the greatest 6..9 and 6..7.
    assert result.low == pytest.approx(1.3)
    assert result.high == pytest.approx((30 + 30 + 13) / 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clustered_bootstrap(torch.zeros(3), torch.zeros(4)), "clusters"),
        (lambda: clustered_bootstrap(torch.zeros(3, 2), torch.zeros(3)), "transform"),
        (lambda: clustered_bootstrap(torch.zeros(0), torch.zeros(0)), "expected values"),
        (lambda: moving_block_bootstrap(torch.zeros(9), 5), "twice"),
        (lambda: moving_block_bootstrap(torch.zeros(9), 0), "twice"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
