import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from recsys.columns.column_auc import column_aucs

N = 4000


@pytest.fixture
def labels():
    return np.random.default_rng(0).random((N, 1)) < 0.2


def area(column, labels, mask=None):
    mask = np.ones(labels.shape, bool) if mask is None else mask
    return column_aucs(pl.Series("c", column), labels.astype(np.float32), mask)[0]


def test_numbers_are_judged_by_their_order(labels):
    numbers = labels[:, 0] + np.random.default_rng(1).normal(size=N)
    expected = roc_auc_score(labels[:, 0], numbers)
    assert area(numbers, labels) == pytest.approx(expected, abs=1e-12)
    assert area(-numbers, labels) == pytest.approx(expected, abs=1e-12)


def test_categories_are_judged_by_their_means(labels):
    kind = np.where(labels[:, 0], "a", "b")
    assert area(kind, labels) == 1.0
    draw = np.random.default_rng(2)
    noisy = np.where(draw.random(N) < 0.8, kind, draw.choice(["a", "b"], N))
    two = roc_auc_score(labels[:, 0], noisy == "a")
    assert area(noisy, labels) == pytest.approx(two, abs=0.02)


def test_a_band_of_numbers_is_seen():
    numbers = np.random.default_rng(3).normal(size=N)
    labels = (np.abs(numbers) > 1.2)[:, None]
    assert area(numbers, labels) > 0.99
    assert max(roc_auc_score(labels[:, 0], numbers), 0.5) < 0.55


def test_where_it_is_missing_is_seen(labels):
    numbers = np.where(labels[:, 0], np.nan, np.random.default_rng(4).normal(size=N))
    assert area(numbers, labels) > 0.99


def test_distinct_values_predict_nothing(labels):
    assert area([f"id{k}" for k in range(N)], labels) < 0.55
    assert area(np.random.default_rng(5).permutation(N), labels) < 0.55


def test_masked_rows_do_not_count(labels):
    kind = np.where(labels[:, 0], "a", "b")
    kind[: N // 2] = "c"
    mask = np.arange(N)[:, None] >= N // 2
    assert area(kind, labels, mask) == 1.0
    assert area(kind, labels) < 0.9


def test_a_class_without_rows_is_not_judged():
    assert np.isnan(area([1, 2, 3], np.zeros((3, 1), bool)))
