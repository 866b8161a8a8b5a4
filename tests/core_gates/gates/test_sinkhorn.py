import pytest
import torch
from torch.testing import assert_close

from core_gates.gates.sinkhorn import SinkhornGate, sinkhorn_prices
from tests.core_gates.drawn import identity_gate, randn


def skewed(num_tokens, num_experts):
    return randn(num_tokens, num_experts) + torch.linspace(0, 2, num_experts)


def test_prices_balance_the_plan():
    values = randn(3, 40, 5) + torch.linspace(0, 2, 5)
    plan = (values - sinkhorn_prices(values, 200)).softmax(-1)
    assert_close(plan.sum(1), torch.full((3, 5), 8.0, dtype=torch.float64))


def test_prices_follow_the_scaling_of_the_matrix_itself():
    values = skewed(12, 4)
    plan = values.exp()
    for _ in range(7):
        plan = plan / plan.sum(1, keepdim=True) / 12
        plan = plan / plan.sum(0) / 4
    expected = values - (plan / plan.sum(1, keepdim=True)).log()
    found = sinkhorn_prices(values[None], 7)[0]
    assert_close(found - found[:, :1], (expected - expected[:, :1])[:1])


def test_prices_of_experts_that_differ_by_a_constant_are_that_constant():
    shift = torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64)
    values = randn(5, 1).expand(5, 3) + shift
    assert_close(sinkhorn_prices(values[None], 1)[0, 0].diff(), shift.diff())


def test_large_scores_and_empty_groups_stay_finite():
    assert sinkhorn_prices(1e4 * randn(1, 6, 3), 20).isfinite().all()
    assert sinkhorn_prices(randn(2, 0, 3), 20).tolist() == [[[0.0] * 3]] * 2
    assert not sinkhorn_prices(randn(1, 6, 3), 20, torch.ones(1, 6, 1, dtype=torch.bool)).any()


def test_training_spreads_the_load_and_evaluation_takes_the_best():
    gate, x = identity_gate(SinkhornGate, 8), skewed(400, 8)
    load = torch.bincount(gate(x).indices.flatten(), minlength=8).double()
    best = torch.bincount(x.argmax(-1), minlength=8).double()
    assert best.std() / best.mean() > 0.8
    assert load.std() / load.mean() < 0.15
    assert torch.equal(gate.eval()(x).indices, x.argmax(-1, keepdim=True))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_are_scores_of_the_raw_logits(score):
    gate, x = identity_gate(SinkhornGate, 4, k=2, score=score), skewed(30, 4)
    routing = gate(x)
    expected = x.softmax(-1) if score == "softmax" else x.sigmoid()
    assert_close(routing.weights, expected.gather(-1, routing.indices))
    assert_close(routing.probs, expected / expected.sum(-1, keepdim=True))
    assert (routing.indices != x.topk(2).indices).any()


def test_groups_and_padding_do_not_compete():
    x = skewed(12, 3).view(2, 6, 3)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 2:] = True
    indices = identity_gate(SinkhornGate, 3, group_dim=-2)(x, padding_mask=mask).indices
    assert torch.equal(indices[0], identity_gate(SinkhornGate, 3)(x[0]).indices)
    assert torch.equal(indices[1, :2], identity_gate(SinkhornGate, 3)(x[1, :2]).indices)
    together = identity_gate(SinkhornGate, 3)(x, padding_mask=mask).indices
    assert torch.equal(together[~mask], identity_gate(SinkhornGate, 3)(x[~mask]).indices)
