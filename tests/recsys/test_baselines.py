"""Baselines, and days that are trained one after the other."""

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.baselines import BaseRates, Biases, Factorization, OneColumn, Trees, WithIntercepts
from recsys.daily import DailyState, continue_from
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.experiments.from_settings import baseline
from recsys.ranker_module import MultiTaskModule
from recsys.schema import Dense, FeatureSchema, Sparse, Task, Threshold
from recsys.transform import FeatureTransform

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
    assert (found.shape, found[0, 0]) == ((4, 1), pytest.approx((2 + 0.5) / (6 + 1)))


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
    assert auc > roc_auc_score(labels[:, task], truth[N // 2 :, task]) - 0.03
    constant = BaseRates().fit(train, test.take(slice(0, 500))).predict(test)
    assert log_loss(found, labels)[task] < log_loss(constant, labels)[task] - 0.05


def test_each_task_may_have_its_column(rows_of):
    dense = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    rows = rows_of((dense > 0).float(), dense=dense)
    both = OneColumn((0, 1)).fit(rows, rows).predict(rows)
    assert [roc_auc_score(rows.labels[:, k], both[:, k]) > 0.99 for k in (0, 1)] == [True, True]
    swapped = OneColumn((1, 0)).fit(rows, rows).predict(rows)
    assert all(abs(roc_auc_score(rows.labels[:, k], swapped[:, k]) - 0.5) < 0.1 for k in (0, 1))
    skewed = rows_of(dense > torch.tensor([0.0, 1.0]), dense=dense)
    flat = OneColumn((0, 1), prior=1e9).fit(skewed, skewed).predict(skewed)
    assert flat[0] == pytest.approx(skewed.labels.double().mean(0).numpy(), abs=1e-3)
    with pytest.raises(ValueError, match="1 columns for 2 tasks"):
        OneColumn((0,)).fit(rows, rows)


@pytest.mark.parametrize(
    "baseline",
    [
        OneColumn(0),
        Biases((0,), (3,)),
        Trees(),
        Factorization((3,), (0,), (0,)),
        Factorization((3,), (), ()),
    ],
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


@pytest.mark.parametrize("ratio", [0.0, 2.5, 10.0])
def test_biases_have_a_penalty_of_their_own(world, ratio):
    """It is the mean over rows of squared factors and, times the ratio, of squared biases."""
    train, test = halves(world[0])
    options = {} if ratio == 10 else {"bias_penalty": ratio}
    net = Factorization(*FIELDS, epochs=1, **options).fit(train, test).net
    places = train.sparse + net.starts
    factors, biases = net.factors(places), net.bias.weight[places]
    expected = (factors.square().sum() + ratio * biases.square().sum()) / len(places)
    torch.testing.assert_close(
        net(train, torch.zeros(len(places), 0, dtype=torch.int64))[1], expected
    )
    assert biases.square().sum() > 0


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


SCHEMA = FeatureSchema(
    tasks=(Task("click"), Task("like")),
    sparse=(Sparse("user", side="user"), Sparse("item", dim=3, side="item"), Sparse("hour")),
    dense=(Dense("length"),),
    dim=4,
    user="user",
)
OPTIONS = {"dim": 6, "hidden_dims": [8], "rank": [2, 2], "tower_dims": [4]}


def rows(number, seed, users=(0, 30), items=(0, 40)):
    draw = np.random.default_rng(seed)
    user, item = draw.integers(*users, number), draw.integers(*items, number)
    labels = draw.random((number, 2)) < 0.3 + 0.1 * (user % 3)[:, None]
    return pl.DataFrame(
        {
            "user": user, "item": item, "hour": draw.integers(0, 24, number),
            "length": draw.gamma(2.0, 10.0, number), "click": labels[:, 0], "like": labels[:, 1],
        }
    )  # fmt: skip


def module(**options):
    return MultiTaskModule(
        "HoME", OPTIONS, learning_rate=0.01, embedding_learning_rate=0.1, **options
    )


def train(made, transform, optimizer, tables):
    made.ranker.train()
    for table in tables:
        batch = transform.batch(table)
        optimizer.zero_grad()
        made.loss(made(batch), batch.labels, batch.mask, batch.weight).sum().backward()
        optimizer.step()


@pytest.fixture
def first():
    """A module after some steps, its optimizer and its transform."""
    torch.manual_seed(0)
    made, transform = module(), FeatureTransform(SCHEMA).fit(rows(400, 0))
    made.build(transform)
    optimizer = made.configure_optimizers()
    train(made, transform, optimizer, [rows(64, seed) for seed in range(4)])
    return made, optimizer, transform


def state_of(first):
    made, optimizer, transform = first
    return DailyState.of(made, optimizer.state_dict(), transform)


def test_known_rows_and_accumulators_keep_their_bits(first):
    made, _, old = first
    torch.manual_seed(5)
    grown = module()
    transform = continue_from(grown, state_of(first), rows(300, 9, (20, 50), (30, 70)))
    assert transform.sizes["user"] > old.sizes["user"]
    assert transform.sizes["hour"] == old.sizes["hour"]
    before, after = (m.ranker.banks[0].named_tables() for m in (made, grown))
    sums_before, sums_after = (sums_of(m, o) for m, o in ((made, first[1]), (grown, None)))
    for name, table in before.items():
        assert len(after[name]) == transform.sizes[name]
        assert torch.equal(after[name][: len(table)], table)
        assert torch.equal(sums_after[name][: len(table)], sums_before[name])
        assert (sums_after[name][len(table) :] == 0).all()
        assert sums_before[name].max() > 0
    values = pl.Series(range(30))
    table = old.tables["user"].lookup(values)
    assert (transform.tables["user"].lookup(values)[table >= 2] == table[table >= 2]).all()


def sums_of(made, optimizer):
    """The accumulators of each table by its name."""
    optimizer = optimizer or made.configure_optimizers()
    adagrad = next(o for o in optimizer.optimizers if isinstance(o, RowWiseAdagrad))
    bank = made.ranker.banks[0]
    found = {}
    for block in bank._blocks.values():
        sums = adagrad.state[bank.stacks[str(block.dim)].weight]["sum"]
        found[block.name] = sums[block.start : block.start + block.rows]
    return found


def test_a_day_without_new_values_is_as_if_training_had_gone_on(first, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    with pytest.raises(GatesError, match=r"state.safetensors is missing or damaged"):
        DailyState.load(folder)
    state_of(first).save(folder)
    grown = module()
    transform = continue_from(grown, DailyState.load(folder), rows(200, 0))
    assert transform.sizes == first[2].sizes
    more = [rows(64, seed) for seed in (11, 12)]
    train(first[0], first[2], first[1], more)
    train(grown, transform, grown.configure_optimizers(), more)
    expected = first[0].state_dict()
    assert all(torch.equal(expected[name], t) for name, t in grown.state_dict().items())


def test_new_values_are_learned(first):
    new = rows(64, 3, (100, 130), (100, 130))
    grown = module()
    transform = continue_from(grown, state_of(first), new)
    start = {name: t.clone() for name, t in grown.ranker.banks[0].named_tables().items()}
    train(grown, transform, grown.configure_optimizers(), [new] * 3)
    moved = grown.ranker.banks[0].named_tables()["user"] - start["user"]
    old = first[2].sizes["user"]
    assert (moved[2:old] == 0).all()
    assert (moved[old:].abs().sum(1) > 0).all()


def test_averages_of_weights_continue(first):
    torch.manual_seed(0)
    made, transform = module(ema=0.9), first[2]
    made.build(transform)
    made.average.steps += 7
    grown = module(ema=0.9)
    state = DailyState.of(made, made.configure_optimizers().state_dict(), transform)
    continue_from(grown, state, rows(100, 4, (60, 90)))
    assert int(grown.average.steps) == 7


def played(number=4000, seed=0):
    """Play times over durations that are log-normal about a number of the row, with labels."""
    draw = np.random.default_rng(seed)
    x, duration = draw.normal(size=number), draw.uniform(5, 60, number).round(1)
    play = np.maximum(duration * np.exp(x - 0.7 + 0.8 * draw.normal(size=number)), 1.0)
    table = pl.DataFrame({"x": x, "duration": duration, "play": play})
    schema = FeatureSchema(
        (
            Task("play", kind="regression", scale="duration"),
            Task("long", threshold=Threshold("play", factor=1.0, most=18.0)),
            Task("skip", threshold=Threshold("play", most=3.0, below=True)),
        ),
        dense=(Dense("x"), Dense("duration")),
    )
    ends = np.stack([np.minimum(duration, 18), np.full(number, 3.0)], 1)
    z = (x[:, None] - 0.7 - np.log(ends / duration[:, None])) / 0.8
    return table, schema, norm.cdf(z * [1, -1])


@pytest.mark.fault("46 R8")
def test_trees_of_a_number_give_the_labels_that_are_thresholds_of_it():
    table, schema, truth = played()
    transform = FeatureTransform(schema).fit(table)
    train, test = halves(transform.batch(table))
    made = baseline({"kind": "trees", "numbers": True}, transform).fit(train, test)
    found = made.predict(test)
    np.testing.assert_allclose(made.heads.spread.exp().item(), 0.8, rtol=0.08)
    labels = baseline({"kind": "trees"}, transform).fit(train, test).predict(test)
    off, other = (np.abs(one - truth[N // 2 :]).mean() for one in (found, labels))
    assert off < min(0.04, 0.9 * other)  # a normal residual, of which each label tells less
    assert found.shape == (N // 2, 2)
    bare = FeatureTransform(FeatureSchema((Task("y"),), dense=(Dense("x"),))).fit(table)
    with pytest.raises(GatesError, match="numbers needs tasks that are thresholds of numbers"):
        baseline({"kind": "trees", "numbers": True}, bare)
