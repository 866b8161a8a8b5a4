import pytest
import torch

from recsys.inputs import Batch
from recsys.validation import ScoredRows

TASKS = ("click", "like", "buy")


def rows(number, seed):
    g = torch.Generator().manual_seed(seed)
    none = torch.zeros(number, 0)
    labels = torch.randint(0, 2, (number, 3), generator=g).float()
    mask = torch.rand(number, 3, generator=g) < 0.7
    weight = torch.rand(number, generator=g) + 0.5
    return Batch(none.long(), none, (), labels, mask, weight, torch.arange(number))


def test_metrics_are_those_of_all_rows():
    """Against scikit-learn, in batches of different sizes, with a task that has one class."""
    metrics = pytest.importorskip("sklearn.metrics")
    batch = rows(200, 5)
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
    assert len(scored) == 200
    assert ScoredRows(["click"]).metrics() == {}


def metrics_of_shares(parallel):
    batch = rows(40, 5)
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    scored = ScoredRows(TASKS)
    share = parallel.share(torch.arange(40))
    scored.add(logits[share], batch.take(share))
    return scored.metrics()


@pytest.mark.costly("two processes that import torch")
def test_two_ranks_have_the_metrics_of_all_rows(two_ranks):
    found = two_ranks(metrics_of_shares, tolerance=1e-12)
    assert 0 < found["auc_click"] < 1


@pytest.mark.fault("video V24")
def test_rows_in_half_precision():
    """The labels of a batch are cast, too, by a Trainer of precision bf16-true."""
    batch, logits = rows(60, 5), torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    halves = [column.bfloat16() for column in (logits, batch.labels, batch.weight)]
    exact, half = ScoredRows(TASKS), ScoredRows(TASKS)
    half.add(halves[0], batch.replace(labels=halves[1], weight=halves[2]))
    exact.add(halves[0].float(), batch.replace(weight=halves[2].float()))
    assert half.metrics() == exact.metrics()
