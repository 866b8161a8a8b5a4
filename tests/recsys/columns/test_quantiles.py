import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.columns.hashing import QuantileSketch

FRACTIONS = np.arange(1, 16) / 16


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_few_values_are_exact(values):
    sketch = QuantileSketch(64)
    sketch.add(np.array(values))
    expected = np.quantile(values, FRACTIONS, method="inverted_cdf")
    assert (sketch.quantiles(FRACTIONS) == expected).all()


@pytest.mark.parametrize("ordered", [False, True])
def test_many_values_stay_within_the_bound(ordered):
    values = np.random.default_rng(0).lognormal(size=100_000)
    values = np.sort(values) if ordered else values
    sketch = QuantileSketch(512)
    for part in np.array_split(values, 77):
        sketch.add(part)
    ranks = np.searchsorted(np.sort(values), sketch.quantiles(FRACTIONS)) / len(values)
    bound = np.log2(2 * len(values) / 512) / 512
    assert np.abs(ranks - FRACTIONS).max() < bound
    assert sum(map(len, sketch._levels)) < 512 * 10


@given(st.lists(st.integers(1, 40), max_size=20))
def test_batches_change_nothing(sizes):
    values = np.random.default_rng(1).normal(size=sum(sizes))
    whole, parts = QuantileSketch(16), QuantileSketch(16)
    whole.add(values)
    for part in np.split(values, np.cumsum(sizes)):
        parts.add(part)
    assert np.array_equal(whole.quantiles(FRACTIONS), parts.quantiles(FRACTIONS), equal_nan=True)


def test_nothing_has_no_quantiles():
    assert np.isnan(QuantileSketch().quantiles([0.5])).all()
