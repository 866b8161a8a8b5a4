import pytest
import torch
from torch.testing import assert_close

from core_gates.gates.cosine import CosineGate

GOLDEN = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_logits(golden, name):
    g = golden(name)
    dim, num_experts = g["cosine_weight"].shape
    gate = CosineGate(dim, num_experts, projection_dim=None, dtype=torch.float64)
    gate.weight.data.copy_(g["cosine_weight"].T)
    gate.log_tau.data.copy_(g["cosine_tau"].log())
    assert_close(gate(g["softmoe_x"]).logits, g["cosine_logits"], rtol=0, atol=1e-10)


def test_projection_and_both_weightings():
    x = torch.randn(7, 5)
    for renormalize in (True, False):
        gate = CosineGate(5, 4, k=2, projection_dim=3, renormalize=renormalize)
        u, w = x @ gate.projection.T, gate.weight
        cosine = (u @ w.T) / u.norm(dim=-1, keepdim=True) / w.norm(dim=-1)
        routing = gate(x)
        assert_close(routing.logits, cosine / 0.5)
        probs = (cosine / 0.5).softmax(-1)
        top = probs.topk(2)
        expected = top.values / (top.values.sum(-1, keepdim=True) if renormalize else 1)
        assert torch.equal(routing.indices, top.indices)
        assert_close(routing.weights, expected)


def test_temperature_is_learned_and_bounded_below():
    gate = CosineGate(5, 4, k=2, tau=0.3)
    assert gate.tau.item() == pytest.approx(0.3)
    gate(torch.randn(7, 5)).weights.square().sum().backward()
    assert gate.log_tau.grad.abs() > 1e-4
    gate.log_tau.data.fill_(-100.0)
    assert gate.tau.item() == pytest.approx(0.01)


def test_a_position_of_zeros_has_a_finite_gradient():
    gate, x = CosineGate(5, 4, k=2), torch.zeros(1, 5, requires_grad=True)
    routing = gate(x)
    assert not routing.logits.any()
    routing.weights[0, 0].backward()
    assert x.grad.isfinite().all()
