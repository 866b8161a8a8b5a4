import pytest
import torch
from torch.testing import assert_close

from core_gates.gates.base_layer import BaseLayerGate
from core_gates.routing.assignment import solve_exactly
from tests.core_gates.drawn import identity_gate


def skewed(*leading, num_experts):
    scores = torch.randn(
        *leading, num_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return scores + torch.linspace(0, 3, num_experts)


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
def test_golden_total(golden, name):
    g = golden(name)
    routing = identity_gate(BaseLayerGate, g["logits"].shape[1])(g["logits"])
    chosen = g["logits"].gather(1, routing.indices)
    assert_close(chosen.sum(), g["base_total"], rtol=0, atol=1e-10)
    assert_close(routing.weights, chosen.sigmoid(), rtol=0, atol=1e-10)


def test_training_balances_and_evaluation_takes_the_best():
    gate, x = identity_gate(BaseLayerGate, 4), skewed(3, 8, num_experts=4)
    routing = gate(x)
    assert routing.chosen().sum((0, 1)).tolist() == [6] * 4
    assert torch.equal(routing.indices.flatten(), solve_exactly(x.flatten(0, 1)))
    best = gate.eval()(x).indices
    assert torch.equal(best, x.argmax(-1, keepdim=True))
    assert not torch.equal(best, routing.indices)


def test_auction_replaces_the_exact_assignment_beyond_its_limit(monkeypatch):
    x = skewed(60, num_experts=4)
    exact = identity_gate(BaseLayerGate, 4, exact_up_to=60)(x)
    monkeypatch.setattr(
        "core_gates.routing.assignment.solve_exactly", lambda scores: pytest.fail("exact")
    )
    routing = identity_gate(BaseLayerGate, 4, exact_up_to=59)(x)
    assert routing.chosen().sum(0).tolist() == [15] * 4
    best = float(x.gather(1, exact.indices).sum())
    assert best * 0.999 <= float(x.gather(1, routing.indices).sum()) <= best + 1e-9


def test_groups_and_padding_do_not_compete():
    x = skewed(2, 6, num_experts=3)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True
    routing = identity_gate(BaseLayerGate, 3, group_dim=-2)(x, padding_mask=mask)
    assert routing.chosen(dropped=False).sum(1).tolist() == [[2] * 3, [1] * 3]
    assert torch.equal(routing.kept[..., 0], ~mask)
    together = identity_gate(BaseLayerGate, 3)(x, padding_mask=mask)
    assert together.chosen(dropped=False).sum((0, 1)).tolist() == [3] * 3


def test_gradient_is_that_of_the_sigmoid_of_the_chosen_logit():
    x = skewed(6, num_experts=3).requires_grad_()
    routing = identity_gate(BaseLayerGate, 3)(x)
    found = torch.autograd.grad(routing.weights.sum(), x)[0]
    s = routing.weights.detach()
    assert_close(found, torch.zeros_like(x).scatter(1, routing.indices, s * (1 - s)))
    assert_close(routing.probs, x.sigmoid() / x.sigmoid().sum(-1, keepdim=True))
