import pytest
import torch
from torch.testing import assert_close

from core_gates import TopKGate


@pytest.mark.parametrize("name", ["topk_n6_k2_identity", "topk_n9_k4_hardshared"])
def test_golden_gate_and_gradients(golden, name):
    g = golden(name)
    num_experts, dim = g["weight"].shape
    gate = TopKGate(dim, num_experts, k=int(g["k"]), bias=True)
    gate.load_state_dict({"weight": g["weight"], "bias": g["bias"]})
    x, experts = g["x"].requires_grad_(), g["experts"].requires_grad_()
    selectors = gate.selectors(x)  # (b, 1, n), permuted as the vectors demand
    weights = (selectors @ g["perm"].mean(0)).sum(-2)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.einsum("bn,nbh->bh", weights, experts)
    assert_close((weights, y), (g["gate"], g["y"]), rtol=1e-5, atol=1e-6)
    (y * g["cotangent"]).sum().backward()
    for name_, tensor in {
        "x": x,
        "experts": experts,
        "weight": gate.weight,
        "bias": gate.bias,
    }.items():
        assert_close(tensor.grad, g[f"grad_{name_}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
def test_golden_choice_and_both_weightings(golden, name):
    g = golden(name)
    num_experts, k = g["logits"].shape[-1], int(g["k"])
    for renormalize, expected in ((False, "softmax_then_topk"), (True, "softmax_then_topk_renorm")):
        gate = TopKGate(num_experts, num_experts, k=k, renormalize=renormalize, dtype=torch.float64)
        gate.weight.data.copy_(torch.eye(num_experts))
        routing = gate(g["logits"])
        assert torch.equal(routing.indices.sort(-1).values, g["topk_index"].sort(-1).values)
        assert_close(routing.to_dense().weights, g[expected], rtol=0, atol=1e-10)


def test_top_1_without_renormalization_has_a_gradient():
    gate = TopKGate(2, 3, k=1, renormalize=False)
    gate(torch.ones(1, 2)).weights.sum().backward()
    assert gate.weight.grad.abs().sum() > 0
