import dataclasses

import pytest

from harness.planning import Device, rate_of

DEVICE = Device(flops=1e14, utilization=0.5, memory=8e10, bandwidth=1e10, price=2.0)


def test_arithmetic_bounds_rows_and_price():
    found = rate_of(1e8, 1e6, DEVICE, ranks=4, batch_size=1000)
    assert found.compute_s == pytest.approx(1e8 * 1000 / 5e13)
    assert (found.exchange_s, found.bound) == (pytest.approx(1e-4), "arithmetic")
    assert found.rows == pytest.approx(4 * 5e13 / 1e8)
    assert found.price == pytest.approx(8 / 3600 * 1e9 / found.rows)


def test_communication_bounds_them_where_it_takes_longer():
    found = rate_of(1e8, 1e9, DEVICE, ranks=4, batch_size=1000)
    assert (found.bound, found.rows) == ("communication", pytest.approx(4 * 1000 / 0.1))
    added = rate_of(1e8, 1e9, DEVICE, ranks=4, batch_size=1000, overlap=False)
    assert added.rows == pytest.approx(4 * 1000 / 0.102)


def test_more_ranks_cost_the_same_per_row():
    one, many = (rate_of(1e8, 0.0, DEVICE, ranks=n, batch_size=64) for n in (1, 64))
    assert (one.price, many.rows) == (pytest.approx(many.price), pytest.approx(64 * one.rows))


@pytest.mark.parametrize("wrong", [{"flops": 0}, {"utilization": 1.5}, {"price": -1}])
def test_assumptions_that_make_no_sense_are_refused(refuses, wrong):
    refuses(ValueError, (next(iter(wrong)), lambda: dataclasses.replace(DEVICE, **wrong)))
