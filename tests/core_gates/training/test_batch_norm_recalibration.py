"""Running statistics under deterministic gates after training with noisy ones."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates import FeatureSelectionGate, GateMonitor, TopKGate
from core_gates.training import SyncBatchNorm, recalibrate_batch_norm

pytestmark = pytest.mark.fault("endoscopy A4")


def build(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    gate = FeatureSelectionGate(16, rectifier="hard_concrete", init=0.0)
    return nn.Sequential(
        nn.Linear(8, 16), gate, nn.Linear(16, 16), norm(16), nn.Dropout(0.5), nn.Linear(16, 2)
    )


def batches(count=8, size=64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 8, generator=generator) for _ in range(count)]


def train(model):
    """Every step draws the gates once for the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in batches(60):
        optimizer.zero_grad()
        (model(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SyncBatchNorm])
def test_the_statistics_are_the_means_over_the_batches(norm):
    model = train(build(norm))
    assert recalibrate_batch_norm(model, batches()) == 1
    inputs = [model[:3].eval()(x) for x in batches()]
    assert_close(model[3].running_mean, torch.stack([y.mean(0) for y in inputs]).mean(0))
    assert_close(model[3].running_var, torch.stack([y.var(0) for y in inputs]).mean(0))


def test_twice_is_bit_identical_and_draws_nothing():
    model = train(build())
    recalibrate_batch_norm(model, batches())
    once = deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    recalibrate_batch_norm(model, iter(batches()))
    assert_close(model.state_dict(), once, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)


def test_nothing_but_the_statistics_changes():
    model = train(build()).train()
    model[4].eval()
    before, modes = deepcopy(model.state_dict()), [m.training for m in model.modules()]
    momentum = model[3].momentum
    recalibrate_batch_norm(model, batches())
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"3.running_mean", "3.running_var", "3.num_batches_tracked"}
    assert ([m.training for m in model.modules()], model[3].momentum) == (modes, momentum)
    assert all(p.requires_grad for p in model.parameters())


def test_a_batch_may_be_anything_that_the_caller_runs():
    model, same = train(build()), train(build())
    pairs = [{"x": x, "y": None} for x in batches()]
    recalibrate_batch_norm(model, pairs, run=lambda network, batch: network(batch["x"]))
    recalibrate_batch_norm(same, batches())
    assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)


def test_models_without_statistics_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert recalibrate_batch_norm(model, batches()) == 0


@pytest.mark.parametrize("given", ["nothing", "a batch that does not fit"])
def test_a_failure_leaves_the_model_as_it_was(given):
    model = train(build()).train()
    before = deepcopy(model.state_dict())
    kind = ValueError if given == "nothing" else RuntimeError
    with pytest.raises(kind, match="needs at least one batch" if given == "nothing" else "mat1"):
        recalibrate_batch_norm(model, [] if given == "nothing" else [*batches(2), torch.ones(2, 3)])
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[3].training
    assert model[3].momentum == 0.1


def test_monitors_do_not_see_it():
    model = nn.Sequential(nn.BatchNorm1d(8), TopKGate(8, 4))
    monitor = GateMonitor(model)
    recalibrate_batch_norm(model, batches())
    assert monitor.compute()["1"]["tokens"] == 0
