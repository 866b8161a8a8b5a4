"""Probabilities of networks and baselines, and what they score."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.baselines import BaseRates, Biases, OneColumn, Trees
from recsys.data.datamodule import TableDataModule
from recsys.data.tables import RankingTables
from recsys.experiments import predictions
from recsys.experiments.predictions import (
    baseline,
    check_finite,
    mean_auc,
    probabilities,
    scores_of,
    summed_log_loss_of,
)
from recsys.ranker import Ranker
from recsys.schema import Dense, FeatureSchema, Sparse, Task

SCHEMA = FeatureSchema(
    tasks=(Task("view"), Task("like")),
    sparse=(Sparse("a"), Sparse("b")),
    dense=(Dense("x", scaling="standardize"), Dense("y")),
    user="a",
    dim=3,
)


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    columns = {n: draw.integers(0, 9, 300) for n in ("a", "b")}
    columns |= {n: draw.normal(size=300) for n in ("x", "y")}
    columns["view"] = (columns["x"] + draw.normal(size=300) > 0).astype(int)
    columns["like"] = (draw.random(300) < 0.1 * (1 + columns["b"] % 3)).astype(int)
    table = pl.DataFrame(columns)
    return TableDataModule(RankingTables("toy", SCHEMA, table[:200], table[200:240], table[240:]))


@pytest.fixture
def ranker(data):
    torch.manual_seed(0)
    transform = data.transform
    made = Ranker.build(SCHEMA, transform.sizes, transform.dense_width, "MMoE", {"dim": 4})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_probabilities_are_those_of_the_network_row_by_row(data, ranker, monkeypatch):
    monkeypatch.setattr(predictions, "ROWS", 7)  # several blocks, the last one shorter
    rows = data.batch("train")
    found = probabilities(ranker.train(), rows)
    assert not ranker.training
    with torch.no_grad():
        expected = ranker(rows.sparse, rows.dense, rows.sequences).sigmoid()
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found.shape == (200, 2)
    assert found.std(0).min() > 0.01


def test_the_summed_log_loss_is_the_one_by_hand(rows_of):
    """Masked and weighted means over rows, summed over tasks; users do not matter."""
    labels = [[1, 0], [0, 1], [1, 1], [0, 0]]
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    weight = torch.tensor([1.0, 2, 1, 4])
    rows = rows_of(labels, mask=mask, weight=weight, user=torch.tensor([3, 3, 8, 8]))
    p = np.array([[0.9, 0.2], [0.4, 0.5], [0.5, 0.7], [0.1, 0.25]])
    first = -(math.log(0.9) + 2 * math.log(0.6) + math.log(0.5)) / 4
    second = -(math.log(0.8) + math.log(0.7) + 4 * math.log(0.75)) / 6
    assert summed_log_loss_of(rows, p) == pytest.approx(first + second, abs=1e-12)
    tasks = scores_of(rows, p, ("view", "like"))
    assert set(tasks) == {"", "view", "like"}
    ones = np.ones((1, 2))
    assert tasks["view"](ones)["log_loss"][0] == pytest.approx(first, abs=1e-12)
    assert tasks["like"](ones)["log_loss"][0] == pytest.approx(second, abs=1e-12)
    assert "auc" not in tasks["view"](ones)
    exact = scores_of(rows, p, ("view", "like"), exact_auc=True)["like"](ones)["auc"][0]
    assert exact == roc_auc_score([0, 1, 0], [0.2, 0.7, 0.25], sample_weight=[1, 1, 4])


def test_the_auc_of_seeds_is_their_mean(rows_of):
    labels, mask = [[1], [0], [1], [0], [1]], torch.tensor([[True]] * 4 + [[False]])
    rows = rows_of(labels, mask=mask)
    seeds = [np.array([[0.9], [0.1], [0.8], [0.3], [0.0]]), np.array([[0.2]] * 4 + [[0.9]])]
    assert mean_auc(rows, seeds[:1], 0) == 1
    assert mean_auc(rows, seeds, 0) == pytest.approx((1 + 0.5) / 2)


KINDS = {
    "base_rates": (BaseRates, {}),
    "one_column": (OneColumn, {"column": "y", "bins": 7}),
    "biases": (Biases, {"columns": ["b"], "penalty": 3.0}),
    "trees": (Trees, {"columns": ["b"], "max_iter": 12}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_go_by_name(data, kind):
    cls, options = KINDS[kind]
    made = baseline({"kind": kind, **options}, data.transform)
    assert type(made) is cls
    found = made.fit(data.batch("train"), data.batch("validation")).predict(data.batch("test"))
    assert found.shape == (60, 2)
    assert ((found > 0) & (found < 1)).all()


def test_columns_of_baselines_are_those_of_the_table(data):
    """``y`` is the second number, ``b`` the second category."""
    transform = data.transform
    assert baseline({"kind": "one_column", "column": "y"}, transform).column == 1
    assert baseline({"kind": "one_column", "column": "x", "prior": 2.0}, transform).prior == 2.0
    biases = baseline({"kind": "biases"}, transform)
    assert biases.columns == (0, 1)
    assert biases.sizes == (transform.sizes["a"], transform.sizes["b"])
    assert baseline({"kind": "trees", "columns": ["b", "a"]}, transform).sparse == (1, 0)
    assert baseline({"kind": "trees"}, transform).sparse is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "kind of a baseline is ''; choose one of base_rates, .*, factorization, trees"),
        ({"kind": "tree"}, "kind of a baseline is 'tree'"),
        ({"kind": "one_column"}, "column of a baseline is ''; choose one of x, y"),
        ({"kind": "one_column", "column": "a"}, "column of a baseline is 'a'; choose one of x, y"),
        ({"kind": "one_column", "column": {"a": "x"}}, "must name one for each task, see 'a'"),
        ({"kind": "biases", "columns": ["x"]}, "column of a baseline is 'x'; choose one of a, b"),
        ({"kind": "trees", "columns": ["c"]}, "column of a baseline is 'c'"),
        ({"kind": "base_rates", "prior": 3}, "baseline base_rates: .*argument"),
        ({"kind": "trees", "depth": 3}, "baseline trees: .*unexpected keyword argument 'depth'"),
    ],
)
def test_wrong_baselines_are_one_line(data, options, words):
    with pytest.raises(GatesError, match=words) as caught:
        baseline(options, data.transform)
    assert "\n" not in str(caught.value)


def test_a_network_that_has_diverged_is_refused(data, ranker):
    rows = data.batch("validation")
    check_finite(ranker, rows)
    with torch.no_grad():
        next(p for name, p in ranker.named_parameters() if "towers" in name).fill_(torch.nan)
    with pytest.raises(GatesError, match=r"of 80 predictions are not finite, .*learning_rate"):
        check_finite(ranker, rows)
