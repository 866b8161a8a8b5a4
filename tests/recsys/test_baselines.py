import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from recsys.baselines import BaseRates, Biases, Factorization, OneColumn, Trees, WithIntercepts

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


FIELDS = (22, 22), (0,), (1,)


def test_base_rates_are_those_of_the_rows_that_count(rows_of):
    mask = torch.tensor([[True], [True], [False], [True]])
    rows = rows_of([[1], [0], [1], [0]], mask=mask, weight=torch.tensor([2.0, 1, 1, 3]))
    found = BaseRates().fit(rows, rows).predict(rows)
    assert found.shape == (4, 1)
    assert found[0, 0] == pytest.approx((2 + 0.5) / (6 + 1))


@pytest.mark.parametrize(
    ("baseline", "task"),
    [
        (OneColumn(0), 0),
        (Biases((0, 1), (22, 22)), 1),
        (Trees(), 0),
        (Trees(), 1),
        (Factorization(*FIELDS, batch_size=128, epochs=40), 0),
        (Factorization(*FIELDS, batch_size=128, epochs=40), 1),
    ],
    ids=["one column", "biases", "trees, dense", "trees, sparse", "fm, dense", "fm, sparse"],
)
def test_a_baseline_learns_what_it_sees(baseline, task, world):
    rows, truth = world
    train, test = halves(rows)
    found = baseline.fit(train, test.take(slice(0, 500))).predict(test)
    labels = test.labels.double().numpy()
    auc = roc_auc_score(labels[:, task], found[:, task])
    oracle = roc_auc_score(labels[:, task], truth[N // 2 :, task])
    assert auc > oracle - 0.03
    constant = BaseRates().fit(train, test.take(slice(0, 500))).predict(test)
    assert log_loss(found, labels)[task] < log_loss(constant, labels)[task] - 0.05


def test_each_task_may_have_its_column(rows_of):
    dense = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    rows = rows_of((dense > 0).float(), dense=dense)
    both = OneColumn((0, 1)).fit(rows, rows).predict(rows)
    assert [roc_auc_score(rows.labels[:, k], both[:, k]) > 0.99 for k in (0, 1)] == [True, True]
    swapped = OneColumn((1, 0)).fit(rows, rows).predict(rows)
    assert all(abs(roc_auc_score(rows.labels[:, k], swapped[:, k]) - 0.5) < 0.1 for k in (0, 1))
    with pytest.raises(ValueError, match="1 columns for 2 tasks"):
        OneColumn((0,)).fit(rows, rows)


def test_what_a_baseline_does_not_see_it_does_not_know(world):
    rows, _ = world
    train, test = halves(rows)
    found = OneColumn(0).fit(train, test.take(slice(0, 500))).predict(test)
    assert roc_auc_score(test.labels[:, 1], found[:, 1]) < 0.56


@pytest.mark.parametrize(
    "baseline", [OneColumn(0), Biases((0,), (3,)), Trees(), Factorization((3,), (0,), (0,))]
)
def test_a_task_with_a_single_class_is_predicted_by_its_rate(baseline, rows_of):
    g = torch.Generator().manual_seed(1)
    sparse, dense = torch.randint(0, 3, (100, 1), generator=g), torch.randn(100, 1, generator=g)
    rows = rows_of(torch.zeros(100, 1), sparse=sparse, dense=dense)
    found = baseline.fit(rows, rows).predict(rows)
    assert np.isfinite(found).all()
    assert ((found > 0) & (found < 0.02)).all()


def test_factors_find_what_biases_cannot(rows_of):
    """The sign of a label is a product of user and item, without a mean of either."""
    g = torch.Generator().manual_seed(2)
    user, item = torch.randn(30, 2, generator=g), torch.randn(40, 2, generator=g)
    sparse = torch.stack([torch.randint(k, (6000,), generator=g) for k in (30, 40)], 1)
    logits = 3 * (user[sparse[:, 0]] * item[sparse[:, 1]]).sum(1, keepdim=True)
    rows = rows_of(torch.bernoulli(logits.sigmoid(), generator=g), sparse=sparse)
    train, held, test = (rows.take(slice(k, k + 2000)) for k in (0, 2000, 4000))
    labels = test.labels.numpy()[:, 0]
    made = Factorization((30, 40), (0,), (1,), dim=4, learning_rate=0.05, epochs=40, batch_size=256)
    found = roc_auc_score(labels, made.fit(train, held).predict(test)[:, 0])
    biases = roc_auc_score(labels, Biases((0, 1), (30, 40)).fit(train, held).predict(test)[:, 0])
    assert found > 0.85 > 0.7 > biases
    again = made.fit(train, held).predict(test)[:, 0]
    assert roc_auc_score(labels, again) == found  # its seed decides, not the process


def test_more_trees_than_the_validation_rows_want_are_not_grown(world):
    rows, _ = world
    train, test = halves(rows)
    made = Trees(max_iter=400).fit(train, test)
    assert all(model.n_iter_ < 400 for model in made.models)
    scores = [-model.validation_score_ for model in made.models]
    assert all(np.argmin(one) >= len(one) - 16 for one in scores)


@pytest.mark.fault("video V20")
@pytest.mark.parametrize("kind", [lambda: Trees(max_iter=20), lambda: OneColumn(0), BaseRates])
def test_intercepts_give_a_baseline_the_rates_of_the_validation_rows(kind, world, rows_of):
    """Weighted, where a row counts, one number for all rows of a task: their order stays."""
    rows, _ = world
    train, held = halves(rows)
    rare = (torch.rand(held.labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    mask = torch.rand(held.labels.shape, generator=torch.Generator().manual_seed(2)) < 0.8
    weight = torch.linspace(0.5, 2.0, N // 2)
    later = rows_of(
        held.labels * rare, sparse=held.sparse, dense=held.dense, mask=mask, weight=weight
    )
    plain = kind().fit(train, later).predict(later)
    found = WithIntercepts(kind()).fit(train, later).predict(later)
    counted = (mask * weight.unsqueeze(1)).double().numpy()
    wanted = (counted * later.labels.double().numpy()).sum(0)
    np.testing.assert_allclose((counted * found).sum(0), wanted, rtol=1e-6)
    assert (abs((counted * plain).sum(0) / wanted - 1) > 0.2).all()  # it was not so before
    shift = np.log(found / (1 - found)) - np.log(plain / (1 - plain))
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:1], shift.shape), atol=1e-6)


@pytest.mark.fault("video R8")
def test_trees_of_a_task_without_validation_rows_are_stopped_by_training_rows(world):
    rows, _ = world
    train, test = halves(rows)
    mask = torch.ones_like(test.mask)
    mask[:, 1] = False
    made, other = Trees(max_iter=120), Trees(max_iter=120)
    found, expected = (
        one.fit(train, part).predict(test)
        for one, part in ((made, test.replace(mask=mask)), (other, test))
    )
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    assert 10 < made.models[1].n_iter_ < 120
    assert roc_auc_score(test.labels[:, 1], found[:, 1]) > 0.7
