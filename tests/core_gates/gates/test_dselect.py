import pytest
import torch
from torch.testing import assert_close

from core_gates.gates.dselect import DSelectKGate
from tests.core_gates.drawn import filled, randn

GOLDEN = ["dselectk_n4_k2_g1", "dselectk_n6_k2_g05", "dselectk_n9_k4_g5_perm"]
DIM = 6


def positions(*shape):
    return randn(*shape, DIM, seed=2)


def build(num_experts=5, scale=1.0, **options):
    gate = DSelectKGate(DIM, num_experts, dtype=torch.float64, **options)
    return filled(gate, scale=scale)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_and_gradients(golden, name):
    g = golden(name)
    num_experts, dim = int(g["num_experts"]), g["x"].shape[-1]
    gate = DSelectKGate(dim, num_experts, k=int(g["k"]), gamma=float(g["gamma"]))
    state = {
        "code_weight": g["z_kernel"].T,
        "code_bias": g["z_bias"],
        "selector_weight": g["w_kernel"].T,
        "selector_bias": g["w_bias"],
    }
    gate.load_state_dict(state)
    x, experts = g["x"].requires_grad_(), g["experts"].requires_grad_()
    weights = torch.einsum("bje,jef->bf", gate.selectors(x), g["perm"])
    y = torch.einsum("bn,nbh->bh", weights, experts)
    aux = gate(x).aux
    reg_loss = g["entropy_reg"] * aux["entropy"] + g["zeta"] * aux["lost_mass"]
    for actual, expected in (
        (gate._select(x, None)[1], "selectors"),
        (weights, "gate"),
        (y, "y"),
        (reg_loss, "reg_loss"),
    ):
        assert_close(actual, g[expected], rtol=1e-5, atol=1e-6)
    ((y * g["cotangent"]).sum() + reg_loss).backward()
    gradients = {
        "x": x.grad,
        "experts": experts.grad,
        "z_kernel": gate.code_weight.grad.T,
        "z_bias": gate.code_bias.grad,
        "w_kernel": gate.selector_weight.grad.T,
        "w_bias": gate.selector_bias.grad,
    }
    for key, gradient in gradients.items():
        assert_close(gradient, g[f"grad_{key}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("num_experts", [2, 3, 4, 7, 8, 33])
def test_codes_without_an_expert_take_the_missing_mass(num_experts, per_example):
    gate = build(num_experts, k=2, gamma=6.0, per_example=per_example)
    x = positions(30)
    routing = gate(x)
    sums = routing.weights.sum(-1)
    assert routing.weights.shape == (30, num_experts)
    assert (routing.weights >= 0).all()
    if num_experts in (2, 4, 8):
        assert_close(sums, torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-12)
        assert routing.aux["lost_mass"] == 0
    else:
        assert (sums <= 1 + 1e-12).all()
        assert (sums < 1).any()
        assert routing.aux["lost_mass"] > 2 * (30 if per_example else 1) * (1 - 1e-5)
    assert_close(gate.selectors(x).sum(-2), routing.weights)


def test_closed_bits_choose_the_expert_of_the_code():
    gate = DSelectKGate(DIM, 7, k=3, gamma=0.5, per_example=False)
    gate.code_weight.data.copy_(torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0]]).flatten() - 0.5)
    gate.selector_weight.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    share = torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    expected = torch.zeros(7)
    expected[[5, 1, 6]] = share
    routing = gate(positions(2, 3).float())
    assert_close(routing.weights, expected.expand(2, 3, 7))
    assert_close(routing.aux["entropy"], torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(routing.aux["lost_mass"], torch.tensor(3.0))


def test_static_selectors_learn(refuses):
    gate, x = build(5, per_example=False, gamma=4.0), positions(4)
    assert (gate.code_bias, gate.selector_bias) == (None, None)
    mask = torch.tensor([True, False, False, True])
    routing = gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
    assert not routing.weights[mask].any()
    assert torch.equal(routing.weights[1], routing.weights[2])
    (routing.weights.square().sum() + routing.aux["entropy"]).backward()
    assert gate.code_weight.grad.all()
    assert gate.selector_weight.grad.all()
    refuses(ValueError, ("must be bool", lambda: gate(x, padding_mask=mask.long())))


def test_padding_does_not_count_in_the_losses():
    gate, x = build(5, gamma=4.0), positions(6)
    mask = torch.tensor([False, True, False, False, True, True])
    masked = gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask).aux
    assert_close(masked, gate(x[~mask]).aux)
    nothing = gate(x, padding_mask=torch.ones_like(mask)).aux
    assert [loss.item() for loss in nothing.values()] == [0, 0]
    assert [loss.item() for loss in gate(x[:0]).aux.values()] == [0, 0]


def test_start():
    gate = DSelectKGate(300, 6, k=2, gamma=5.0)
    for tensor, bound in ((gate.code_weight, 0.05), (gate.selector_weight, 0.05)):
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert (gate(torch.randn(20, 300)).weights > 0).all()
