import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from recsys.baselines import BaseRates, Biases, OneColumn, Trees

N = 4000


@pytest.fixture
def world(rows_of):
    """Two tasks: the first follows a dense column, the second users and items."""
    g = torch.Generator().manual_seed(0)
    sparse = torch.randint(2, 22, (N, 2), generator=g)
    dense = torch.randn(N, 1, generator=g)
    bias = torch.randn(2, 22, generator=g) * 1.5
    logits = torch.stack([2 * dense[:, 0] - 1, bias[0, sparse[:, 0]] + bias[1, sparse[:, 1]]], 1)
    truth = logits.sigmoid()
    labels = torch.bernoulli(truth, generator=g)
    return rows_of(labels, sparse=sparse, dense=dense), truth.double().numpy()


def halves(rows):
    return rows.take(slice(0, N // 2)), rows.take(slice(N // 2, None))


def log_loss(p, y):
    return -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean(0)


def test_base_rates_are_those_of_the_rows_that_count(rows_of):
    mask = torch.tensor([[True], [True], [False], [True]])
    rows = rows_of([[1], [0], [1], [0]], mask=mask, weight=torch.tensor([2.0, 1, 1, 3]))
    found = BaseRates().fit(rows).predict(rows)
    assert found.shape == (4, 1)
    assert found[0, 0] == pytest.approx((2 + 0.5) / (6 + 1))


@pytest.mark.parametrize(
    ("baseline", "task"),
    [(OneColumn(0), 0), (Biases((0, 1), (22, 22)), 1), (Trees(), 0), (Trees(), 1)],
    ids=["one column", "biases", "trees, dense", "trees, sparse"],
)
def test_a_baseline_learns_what_it_sees(baseline, task, world):
    rows, truth = world
    train, test = halves(rows)
    found = baseline.fit(train).predict(test)
    labels = test.labels.double().numpy()
    auc = roc_auc_score(labels[:, task], found[:, task])
    oracle = roc_auc_score(labels[:, task], truth[N // 2 :, task])
    assert auc > oracle - 0.03
    constant = BaseRates().fit(train).predict(test)
    assert log_loss(found, labels)[task] < log_loss(constant, labels)[task] - 0.05


def test_what_a_baseline_does_not_see_it_does_not_know(world):
    rows, _ = world
    train, test = halves(rows)
    found = OneColumn(0).fit(train).predict(test)
    assert roc_auc_score(test.labels[:, 1], found[:, 1]) < 0.56


@pytest.mark.parametrize("baseline", [OneColumn(0), Biases((0,), (3,)), Trees()])
def test_a_task_with_a_single_class_is_predicted_by_its_rate(baseline, rows_of):
    g = torch.Generator().manual_seed(1)
    sparse, dense = torch.randint(0, 3, (100, 1), generator=g), torch.randn(100, 1, generator=g)
    rows = rows_of(torch.zeros(100, 1), sparse=sparse, dense=dense)
    found = baseline.fit(rows).predict(rows)
    assert np.isfinite(found).all()
    assert ((found > 0) & (found < 0.02)).all()
