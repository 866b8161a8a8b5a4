import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from weather.metrics import paired_difference


def series(runs, length, coefficient, seed=0):
    noise = torch.randn(length + 50, runs, generator=torch.Generator().manual_seed(seed)).double()
    values = [noise[0]]
    for shock in noise[1:]:
        values.append(coefficient * values[-1] + shock)
    return torch.stack(values[50:])


def test_without_autocorrelation_it_is_the_paired_t_test():
    a, b = series(200, 30, 0.0), series(200, 30, 0.0, seed=1) + 0.3
    result = paired_difference(a, b)
    expected = scipy.stats.ttest_rel(a.numpy(), b.numpy())
    plain = result.inflation == 1
    assert 20 < plain.sum() < 180
    assert_close(result.p_value[plain], torch.from_numpy(expected.pvalue)[plain])
    interval = expected.confidence_interval(0.95)
    assert_close(result.low[plain], torch.from_numpy(interval.low)[plain])
    assert_close(result.high[plain], torch.from_numpy(interval.high)[plain])
    assert (result.p_value >= torch.from_numpy(expected.pvalue) - 1e-12).all()


@pytest.mark.parametrize("coefficient", [0.0, 0.6])
def test_false_alarms_are_as_rare_as_promised(coefficient):
    a = series(2000, 300, coefficient)
    alarms = (paired_difference(a, torch.zeros_like(a)).p_value < 0.05).double().mean()
    assert 0.02 < alarms < 0.08


def test_a_first_order_process_has_the_known_inflation():
    a = series(50, 20000, 0.5)
    inflation = paired_difference(a, torch.zeros_like(a)).inflation.mean()
    assert inflation.item() == pytest.approx((1.5 / 0.5) ** 0.5, rel=0.02)


def test_a_second_order_process_has_the_known_inflation():
    noise = torch.randn(30050, 20, generator=torch.Generator().manual_seed(0)).double()
    values = [noise[0], noise[1]]
    for shock in noise[2:]:
        values.append(0.5 * values[-1] + 0.3 * values[-2] + shock)
    a = torch.stack(values[50:])
    r1 = 0.5 / 0.7
    expected = ((1 - 0.5 * r1 - 0.3 * (0.5 * r1 + 0.3)) / 0.2**2) ** 0.5
    inflation = paired_difference(a, torch.zeros_like(a)).inflation.mean()
    assert inflation.item() == pytest.approx(expected, rel=0.02)


def test_a_real_difference_is_found_and_equal_scores_are_equal():
    a = series(3, 300, 0.5)
    result = paired_difference(a, a + 0.5 + 0.1 * series(3, 300, 0.0, seed=2))
    assert (result.high < 0).all()
    assert (result.p_value < 1e-6).all()
    equal = paired_difference(a, a)
    assert (equal.mean == 0).all()
    assert (equal.p_value == 1).all()
    assert (equal.low == 0).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="four"):
        paired_difference(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="pairs"):
        paired_difference(torch.zeros(5), torch.zeros(5, 1))
