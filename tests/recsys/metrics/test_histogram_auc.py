import numpy as np
import pytest

from core_gates.errors import GatesError
from recsys.metrics import HistogramAUC, auc


def rows(n=20_000, rate=0.01, seed=0):
    rng = np.random.default_rng(seed)
    probs = 1 / (1 + np.exp(-rng.normal(np.log(rate), 1.5, n)))
    return probs, rng.random(n) < probs, rng.random(n)


@pytest.mark.parametrize("bins", [4, 64, 2**14])
def test_the_exact_area_lies_within_the_bound(bins):
    probs, labels, weights = rows()
    histogram = HistogramAUC(bins)
    for part in np.array_split(np.arange(len(probs)), 7):
        histogram.update(probs[part], labels[part], weights[part])
    found = histogram.compute()
    exact = auc(probs, labels, weights).value
    assert abs(found.value - exact) <= found.error + 1e-12
    assert found.error < 16 / bins


def test_the_bound_is_reached():
    histogram = HistogramAUC(2)
    histogram.update([0.6, 0.7], [0, 1])
    assert histogram.compute()[:2] == (0.5, 0.5)


def test_batches_of_any_size_give_the_same_counts():
    probs, labels, weights = rows(500)
    once, often = HistogramAUC(256), HistogramAUC(256)
    once.update(probs, labels, weights)
    for i in range(500):
        often.update(probs[i : i + 1], labels[i : i + 1], weights[i : i + 1])
    np.testing.assert_allclose(once.counts, often.counts, atol=1e-12)


def test_certain_predictions_are_counted():
    histogram = HistogramAUC()
    histogram.update([0.0, 1.0, 0.5], [0, 1, 1])
    assert histogram.compute() == (1.0, 0.0, "")


def test_a_single_class_has_no_area():
    histogram = HistogramAUC()
    histogram.update([0.2, 0.3], [0, 0])
    assert histogram.compute().reason == "no positive row"
    with pytest.raises(GatesError, match="apply the sigmoid to logits first"):
        histogram.update([-1.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match="bins must be at least 2"):
        HistogramAUC(1)


def test_one_process_has_nothing_to_add():
    histogram = HistogramAUC()
    histogram.update([0.2, 0.3], [0, 1])
    histogram.all_reduce()
    assert histogram.compute().value == 1
