"""Losses, metrics, averages and calibration of validation."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recsys.inputs import Batch
from recsys.ranker import Ranker
from recsys.schema import Task
from recsys.validation import (
    MultiTaskLoss,
    ScoredRows,
    WeightAverage,
    calibrate,
    intercepts_of,
    task_sums,
)

WEIGHTED = [Task("click"), Task("like", weight=0.5), Task("buy", weight=0)]


def drawn(rows=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 2, (rows, 3), generator=g).double()
    mask = torch.rand(rows, 3, generator=g) < 0.6
    return logits, labels, mask, torch.rand(rows, generator=g, dtype=torch.float64)


def test_the_formula():
    """``mean_b(m BCE) / mean m`` with sample weights, written out row by row."""
    logits, labels, mask, weight = drawn()
    losses = MultiTaskLoss(WEIGHTED)(logits, labels, mask, weight)
    for t in range(3):
        above = below = 0.0
        for b in range(9):
            p = logits[b, t].sigmoid()
            bce = -(labels[b, t] * p.log() + (1 - labels[b, t]) * (1 - p).log())
            above += weight[b] * mask[b, t] * bce / 9
            below += weight[b] * mask[b, t] / 9
        assert_close(losses[t], above / below, rtol=1e-12, atol=0)


def test_masked_labels_and_logits_do_not_matter():
    logits, labels, mask, weight = drawn()
    losses = MultiTaskLoss(WEIGHTED)(logits, labels, mask, weight)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).all()
    missing = labels.masked_fill(~mask, torch.nan)
    assert_close(MultiTaskLoss(WEIGHTED)(logits, missing, mask, weight), losses, rtol=0, atol=0)


def test_a_task_that_counts_nowhere_costs_nothing():
    logits, labels, mask, weight = drawn()
    mask[:, 1] = False
    losses = MultiTaskLoss(WEIGHTED)(logits, labels, mask, weight)
    assert losses[1] == 0
    assert losses[0] > 0
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(grad).all()


@pytest.mark.fault("video R4")
def test_which_tasks_count():
    logits, labels, mask, weight = drawn()
    mask[:, 1] = False
    found = MultiTaskLoss(WEIGHTED).counted(logits, labels, mask, weight)
    assert found.counted.tolist() == [True, False, True]
    assert torch.equal(found.losses, MultiTaskLoss(WEIGHTED)(logits, labels, mask, weight))
    weight[mask[:, 2]] = 0  # rows that weigh nothing
    found = MultiTaskLoss(WEIGHTED).counted(logits, labels, mask, weight)
    assert not found.counted[2]


def test_sums_of_parts_are_those_of_the_whole():
    parts = [drawn(rows, seed) for seed, rows in enumerate((4, 7))]
    whole = task_sums(*(torch.cat(column) for column in zip(*parts, strict=True)))
    found = [task_sums(*part) for part in parts]
    for name in ("losses", "weights"):
        assert_close(sum(getattr(f, name) for f in found), getattr(whole, name))


def test_half_precision_is_computed_in_float32():
    logits, labels, mask, weight = drawn()
    half = logits.detach().to(torch.bfloat16)
    losses = MultiTaskLoss(WEIGHTED)(half, labels.float(), mask, weight.float())
    assert losses.dtype == torch.float32
    wanted = MultiTaskLoss(WEIGHTED)(half.float(), labels.float(), mask, weight.float())
    assert_close(losses, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["labels", "mask", "weight"])
def test_shapes_are_checked(wrong):
    given_ = dict(zip(("logits", "labels", "mask", "weight"), drawn(), strict=True))
    given_[wrong] = given_[wrong][:4]
    with pytest.raises(ValueError, match=r"\(9, 3\).* must be \(B, T\) three times and \(B,\)"):
        MultiTaskLoss(WEIGHTED)(**given_)


def on_two_ranks(parallel):
    return {"gradient": two_halves(parallel), "metrics": metrics_of_shares(parallel)}


@pytest.fixture(scope="module")
def of_all_rows(two_ranks):
    """What one process finds, and each of two does within 1e-12."""
    return two_ranks(on_two_ranks, tolerance=1e-12)


def two_halves(parallel):
    """The gradient of a linear model whose ranks have masks of different density."""
    _, labels, mask, weight = drawn(8, 3)
    mask[:4] = True
    mask[4:, 1] = False
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.manual_seed(0)
    model = parallel(torch.nn.Linear(4, 3).double())
    found = MultiTaskLoss(WEIGHTED)(
        model(parallel.share(x)), *(parallel.share(t) for t in (labels, mask, weight))
    )
    found.sum().backward()
    return [p.grad for p in model.parameters()]


def test_two_ranks_have_the_gradient_of_all_rows(of_all_rows):
    assert all(grad.isfinite().all() for grad in of_all_rows["gradient"])


TASKS = ("click", "like", "buy")


def batch_of(number, seed):
    g = torch.Generator().manual_seed(seed)
    none = torch.zeros(number, 0)
    labels = torch.randint(0, 2, (number, 3), generator=g).float()
    mask = torch.rand(number, 3, generator=g) < 0.7
    weight = torch.rand(number, generator=g) + 0.5
    return Batch(none.long(), none, (), labels, mask, weight, torch.arange(number))


def test_metrics_are_those_of_all_rows():
    """Against scikit-learn, in batches of different sizes, with a task that has one class."""
    metrics = pytest.importorskip("sklearn.metrics")
    batch = batch_of(200, 5)
    batch.labels[:, 2] = 0
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    scored = ScoredRows(TASKS)
    for part in (slice(0, 7), slice(7, 150), slice(150, 200)):
        scored.add(logits[part], batch.take(part))
    found, total = scored.metrics(), 0.0
    for t, task in enumerate(TASKS):
        seen = batch.mask[:, t]
        given = batch.labels[seen, t], logits[seen, t].sigmoid().double()
        weight = batch.weight[seen]
        loss = metrics.log_loss(*given, sample_weight=weight, labels=[0, 1])
        assert abs(found[f"loss_{task}"] - loss) < 1e-6
        total += loss
        if t < 2:
            area = metrics.roc_auc_score(*given, sample_weight=weight)
            assert abs(found[f"auc_{task}"] - area) < 1e-6
    assert found["auc_buy"] != found["auc_buy"]  # NaN
    assert abs(found["loss"] - total) < 1e-6
    assert (len(scored), ScoredRows(["click"]).metrics()) == (200, {})


def metrics_of_shares(parallel):
    batch = batch_of(40, 5)
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    scored = ScoredRows(TASKS)
    share = parallel.share(torch.arange(40))
    scored.add(logits[share], batch.take(share))
    return scored.metrics()


def test_two_ranks_have_the_metrics_of_all_rows(of_all_rows):
    assert 0 < of_all_rows["metrics"]["auc_click"] < 1


@pytest.mark.fault("video V24")
def test_rows_in_half_precision():
    """The labels of a batch are cast, too, by a Trainer of precision bf16-true."""
    batch, logits = batch_of(60, 5), torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    halves = [column.bfloat16() for column in (logits, batch.labels, batch.weight)]
    exact, half = ScoredRows(TASKS), ScoredRows(TASKS)
    half.add(halves[0], batch.replace(labels=halves[1], weight=halves[2]))
    exact.add(halves[0].float(), batch.replace(weight=halves[2].float()))
    assert half.metrics() == exact.metrics()


def test_the_formula_of_the_average():
    w = {"net.a": nn.Parameter(torch.tensor([1.0, -2.0]))}
    average = WeightAverage(w, 0.3)
    expected = w["net.a"].detach().clone()
    for step in range(1, 5):
        with torch.no_grad():
            w["net.a"] += step
        average.update(w)
        d = min(0.3, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * w["net.a"].detach()
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 4) / (10 + 4)  # both branches were taken
    assert_close(average.average("net.a"), expected)
    before = w["net.a"].detach().clone()
    with average.swapped(w):
        assert_close(w["net.a"].detach(), expected)
    assert torch.equal(w["net.a"], before)


@pytest.mark.fault("video V24")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_stay_exact_in_a_module_of_half_precision(dtype):
    """Lightning casts the whole module after it was built; 1 % of a step is lost to bfloat16."""
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(2))
    module.kept = WeightAverage({"w": module.w}, 0.9999)
    module.to(dtype)
    assert module.w.dtype == dtype
    module.kept.steps.fill_(100_000)
    with torch.no_grad():
        module.w += 1
    module.kept.update({"w": module.w})
    assert_close(module.kept.average("w"), torch.full((2,), 1.0001))


def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"ema must lie in \[0, 1\), got 1"):
        WeightAverage({}, 1.0)


TOY = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "toy_ranker.py"))


def ranker(**further):
    torch.manual_seed(0)

    def net(input_dim, tasks):
        return TOY["ToyNet"](input_dim, tasks, hidden=5)

    return Ranker(TOY["schema"](), TOY["SIZES"], 4, net, **further).eval()


def rows(count=500, tasks=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, tasks, generator=draw, dtype=torch.float64)
    labels = (torch.rand(count, tasks, generator=draw) < 0.2).double()
    mask = torch.rand(count, tasks, generator=draw) < 0.7
    return logits, labels, mask, torch.rand(count, generator=draw) + 0.5


def test_mean_predictions_are_the_rates():
    logits, labels, mask, weight = rows()
    shift = intercepts_of(logits, labels, mask, weight)
    counted = mask * weight.unsqueeze(1)
    predicted = (counted * (logits + shift).sigmoid()).sum(0)
    assert_close(predicted, (counted * labels).sum(0), rtol=1e-9, atol=0)
    assert shift.abs().min() > 0.1  # what was given is not calibrated


def test_tasks_with_one_class_or_without_rows_stay():
    logits, labels, mask, weight = rows()
    labels[:, 0], labels[:, 1], mask[:, 2] = 0, 1, False
    assert_close(intercepts_of(logits, labels, mask, weight), torch.zeros(3, dtype=torch.float64))


def test_a_ranker_keeps_its_order_and_gets_its_rates():
    made, (sparse, dense, sequences) = ranker(calibrated=True), TOY["rows"](64)
    labels = (torch.rand(64, len(made.schema.tasks)) < 0.3).float()
    batch = Batch(sparse, dense, sequences, labels, labels >= 0, torch.ones(64), torch.arange(64))
    with torch.no_grad():
        before = made(sparse, dense, sequences)
        calibrate(made, batch)
        after = made(sparse, dense, sequences)
    assert_close(after - before, made.intercepts.expand_as(after), rtol=1e-4, atol=1e-5)
    assert_close(after.sigmoid().mean(0), labels.mean(0), rtol=1e-4, atol=1e-5)
    calibrate(made, batch)  # twice is once
    assert_close(made(sparse, dense, sequences), after)
    assert "intercepts" in made.state_dict()


def test_refuses_a_ranker_without_intercepts(rows_of):
    with pytest.raises(ValueError, match="calibrated=True"):
        calibrate(ranker(), rows_of(torch.zeros(2, 2)))
