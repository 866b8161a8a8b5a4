"""Probabilities of networks and baselines, and what they score."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from core_gates import GatesError
from recsys import TableDataModule
from recsys.baselines import BaseRates, Biases, OneColumn, Trees
from recsys.data.tables import RankingTables
from recsys.experiments import baseline, predictions
from recsys.experiments.predictions import (
    category_rows,
    check_finite,
    mean_auc,
    probabilities,
    scores_of,
    slice_rows,
    slices_of,
    summed_log_loss_of,
)
from recsys.metrics import summed_log_loss, user_resamples
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
    assert (biases.columns, biases.sizes) == ((0, 1), (transform.sizes["a"], transform.sizes["b"]))
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


CATEGORY_LOSSES_KINDS = {"click": "watch", "like": "inter", "long": "watch"}


def schema_of(kinds):
    tasks = tuple(Task(name, category=kind) for name, kind in kinds.items())
    return FeatureSchema(tasks=tasks, sparse=(Sparse("u"),), user="u")


@pytest.fixture
def rows(rows_of):
    rng = np.random.default_rng(5)
    labels = rng.random((300, 3)) < 0.4
    mask = torch.from_numpy(rng.random((300, 3)) < 0.8)
    weight = torch.from_numpy(rng.random(300).astype(np.float32))
    user = torch.from_numpy(rng.integers(0, 30, 300))
    return rows_of(labels, mask=mask, weight=weight, user=user)


def test_categories_are_summed_alone_and_compared_in_pairs(rows):
    rng = np.random.default_rng(6)
    found = {name: [rng.uniform(0.1, 0.9, (300, 3)) for _ in range(2)] for name in ("a", "b")}
    draws = user_resamples(rows.user.numpy(), resamples=50)
    made = category_rows(rows, found, schema_of(CATEGORY_LOSSES_KINDS), draws, reference="a")
    values = {(row.method, row.metric, row.versus or None): row for row in made}
    assert len(made) == len(values) == 6
    for category, places in (("watch", [0, 2]), ("inter", [1])):
        metric = f"summed log_loss {category}"
        arguments = rows.user.numpy(), rows.mask[:, places].numpy(), rows.weight.numpy()
        labels = rows.labels[:, places].numpy()
        expected = {
            name: np.mean([_loss(labels, p[:, places], *arguments) for p in own])
            for name, own in found.items()
        }
        assert values["a", metric, None].value == pytest.approx(expected["a"])
        gap = values["b", metric, "a"]
        assert gap.value == pytest.approx(expected["b"] - expected["a"])
        assert gap.low < gap.value < gap.high


def _loss(labels, probs, users, mask, weights):
    score = summed_log_loss(labels, probs, users, mask=mask, weights=weights)
    return float(score(np.ones((1, len(np.unique(users)))))["log_loss"][0])


def test_one_category_has_no_rows_of_its_own(rows):
    draws = user_resamples(rows.user.numpy(), resamples=5)
    found = {"a": [np.full((300, 3), 0.5)]}
    assert (
        category_rows(rows, found, schema_of(dict.fromkeys(CATEGORY_LOSSES_KINDS, "all")), draws)
        == []
    )
    masked = rows.replace(mask=rows.mask & torch.tensor([True, False, True]))
    made = category_rows(masked, found, schema_of(CATEGORY_LOSSES_KINDS), draws)
    assert [row.metric for row in made] == ["summed log_loss watch"]


SLICES_SCHEMA = FeatureSchema(
    tasks=(Task("y"), Task("z")), sparse=(Sparse("u"), Sparse("v")), user="u", item="v"
)


def tables(train, test, schema=SLICES_SCHEMA, **columns):
    parts = [pl.DataFrame({"u": u, "v": v}) for u, v in (train, test)]
    parts[1] = parts[1].with_columns(**{n: pl.Series(values) for n, values in columns.items()})
    return RankingTables("slices_rows", schema, parts[0], parts[0].clear(), parts[1])


def test_splits_are_cut_one_by_one_and_joined():
    """User a is new in the first split alone; the column of random rows exists in both."""
    first = tables((["b", "b"], [1, 2]), (["a", "b"], [1, 3]), shown=[1, 0])
    second = tables((["a", "b"], [1, 3]), (["a", "b", None], [1, 4, 3]), shown=[0, 0, None])
    found = slices_of([first, second], random="shown")
    assert found["new users"].tolist() == [True, False, False, False, True]
    assert found["new items"].tolist() == [False, True, False, True, False]
    assert found["random exposure"].tolist() == [True, False, False, False, False]
    assert found["known users"].tolist() == [False, True, True, True, False]


@pytest.mark.fault("video R1")
@pytest.mark.parametrize("nobody", [None, ""], ids=repr)
def test_a_row_without_a_user_is_of_no_known_user(nobody):
    one = tables((["a", nobody, nobody], [1, None, 2]), (["a", nobody, "b"], [None, 1, 2]))
    found = slices_of([one])
    assert found["new users"].tolist() == [False, True, True]
    assert found["new items"].tolist() == [True, False, False]


def test_rows_without_user_or_item_have_no_parts():
    schema = FeatureSchema(tasks=SLICES_SCHEMA.tasks, sparse=SLICES_SCHEMA.sparse, user="u")
    assert slices_of([tables((["a"], [1]), (["a"], [1]), schema)]) == {}
    plain = slices_of([tables((["a"], [1]), (["a"], [1]))], random="shown")
    assert "random exposure" not in plain
    assert plain["known users"].all()


def test_losses_are_those_of_the_rows_alone(rows):
    rng = np.random.default_rng(5)
    found = {"home": [rng.random((300, 3)), rng.random((300, 3))], "mmoe": [rng.random((300, 3))]}
    part = rng.random(300) < 0.4
    made = slice_rows(rows, {"new users": part}, found, reference="home", resamples=50)
    by = {(row.method, row.versus): row for row in made}
    few = rows.take(torch.from_numpy(part))
    labels, *counted = (t.numpy() for t in (few.labels, few.user, few.mask, few.weight))
    expected = {
        m: np.mean([_loss(labels, one[part], *counted) for one in own]) for m, own in found.items()
    }
    for method, value in expected.items():
        row = by[method, ""]
        assert (row.metric, row.value) == ("log-loss, new users", pytest.approx(value, rel=1e-6))
        assert row.low < row.value < row.high
    assert by["mmoe", "home"].value == pytest.approx(expected["mmoe"] - expected["home"], rel=1e-5)
    assert (by["test rows", ""].value, by["test rows", ""].n) == (
        part.sum(),
        len(few.user.unique()),
    )


def test_a_task_that_counts_nowhere_in_a_part_is_left_out(rows):
    mask = rows.mask.clone()
    mask[:20, 1] = False
    part = np.arange(300) < 20
    one = np.full((300, 3), 0.25)
    made = slice_rows(rows.replace(mask=mask), {"a": part}, {"m": [one]}, reference=None)
    assert np.isfinite([made[0].value, made[0].low, made[0].high]).all()


@pytest.mark.fault("video R15")
def test_a_part_of_which_one_user_counts_has_no_interval(rows):
    few = rows.replace(mask=rows.mask & (rows.user == 3)[:, None])
    probs = np.full((300, 3), 0.5)
    (row, _) = slice_rows(few, {"all": np.ones(300, bool)}, {"m": [probs]}, reference=None)
    assert np.isfinite(row.value)
    assert np.isnan(row.low)
    assert row.n == 1
