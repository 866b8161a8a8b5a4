from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from core_gates.gates import comet
from core_gates.gates.comet import CometGate, leaf_numbers, leaf_probabilities
from tests.core_gates.drawn import filled, randn

GOLDEN = [
    "comet_n4_k2_g1_identity",
    "comet_n6_k1_g001_identity_sharp",
    "comet_n6_k2_g05_hardshared",
    "comet_n8_k2_g10_soft",
    "comet_n9_k4_g5_hardeach",
]
SIZES = [2, 3, 5, 6, 7, 9, 12, 16, 33]
DIM = 6


def positions(*shape, dtype=torch.float64):
    return randn(*shape, DIM, seed=2, dtype=dtype)


def build(num_experts=5, scale=1.0, dtype=torch.float64, **options):
    """Return a gate whose branches are partly closed."""
    return filled(CometGate(DIM, num_experts, dtype=dtype, **options), scale=scale)


def depth_first(node, num_leaves):
    if node >= num_leaves - 1:
        return [node]
    return depth_first(2 * node + 1, num_leaves) + depth_first(2 * node + 2, num_leaves)


def golden_gate(g):
    num_experts, dim = int(g["num_experts"]), g["x"].shape[-1]
    gate = CometGate(dim, num_experts, k=int(g["k"]), gamma=float(g["gamma"]))
    state = {
        "node_weight": g["node_kernel"].permute(2, 0, 1),
        "node_bias": g["node_bias"].T,
        "leaf_weight": g["leaf_kernel"].permute(2, 0, 1),
        "leaf_bias": g["leaf_bias"].T,
    }
    gate.load_state_dict(state)
    return gate


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_and_gradients(golden, name):
    g = golden(name)
    gate = golden_gate(g)
    x, experts = g["x"].requires_grad_(), g["experts"].requires_grad_()
    weights = torch.einsum("bje,jef->bf", gate.selectors(x), g["perm"])
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.einsum("bn,nbh->bh", weights, experts)
    reg_loss = g["entropy_reg"] * gate(x).aux["entropy"]
    for actual, expected in ((weights, "gate"), (y, "y"), (reg_loss, "reg_loss")):
        assert_close(actual, g[expected], rtol=1e-5, atol=1e-6)
    ((y * g["cotangent"]).sum() + reg_loss).backward()
    gradients = {
        "x": x.grad,
        "experts": experts.grad,
        "node_kernel": gate.node_weight.grad.permute(1, 2, 0),
        "node_bias": gate.node_bias.grad.T,
        "leaf_kernel": gate.leaf_weight.grad.permute(1, 2, 0),
        "leaf_bias": gate.leaf_bias.grad.T,
    }
    for key, gradient in gradients.items():
        assert_close(gradient, g[f"grad_{key}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_experts", SIZES)
def test_experts_are_the_leaves_from_left_to_right(num_experts):
    order = depth_first(0, num_experts)
    assert leaf_numbers(torch.tensor(order), num_experts).tolist() == list(range(num_experts))
    left = torch.rand(
        num_experts - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = []
    for node in order:
        probability = 1.0
        while node:
            parent = (node - 1) // 2
            turn = left[parent].item()
            probability *= turn if node == 2 * parent + 1 else 1 - turn
            node = parent
        expected.append(probability)
    assert_close(leaf_probabilities(left).tolist(), expected, rtol=0, atol=1e-15)


def test_weights_are_probabilities_tilted_by_scores():
    gate, x = build(7, k=3, gamma=4.0), positions(20)
    turns = torch.einsum("td,jnd->tjn", x, gate.node_weight) + gate.node_bias
    place = (turns / 4).clamp(-0.5, 0.5)
    leaves = leaf_probabilities(-2 * place**3 + 1.5 * place + 0.5)
    scores = torch.einsum("td,jed->tje", x, gate.leaf_weight) + gate.leaf_bias
    expected = torch.where(leaves > 0, (leaves + 1e-8) * scores.exp(), 0)
    expected = expected / expected.sum((-2, -1), keepdim=True)
    assert_close((gate.selectors(x), gate(x).weights), (expected, expected.sum(-2)))
    entropy = -(leaves * (leaves + 1e-6).log()).sum((-2, -1)).mean()
    assert_close(gate(x).aux["entropy"], entropy)


def test_a_saturated_node_gets_no_gradient():
    gate, x = build(2, k=1, gamma=0.1), torch.ones(1, DIM, dtype=torch.float64)
    gate.node_weight.data.fill_(1.0)
    routing = gate(x)
    assert routing.weights.tolist() == [[1, 0]]
    (routing.weights.sum() + routing.aux["entropy"]).backward()
    assert not gate.node_weight.grad.any()


def test_training_on_the_entropy_closes_branches_down_to_k_experts():
    torch.manual_seed(0)
    gate, x = CometGate(DIM, 8, k=2, gamma=0.3), positions(64, dtype=torch.float32)
    assert (gate(x).weights > 0).all()
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        gate(x).aux["entropy"].backward()
        optimizer.step()
    assert (gate(x).weights > 0).sum(-1).float().mean() <= 2.05


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("options", [{}, {"prob_floor": 0.02, "node_bias": False}], ids=str)
def test_open_branches_give_the_same_routing(num_experts, options):
    gate, x = build(num_experts, k=2, gamma=2.0, **options).eval(), positions(2, 10)
    assert (gate.selectors(x) == 0).any()
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 3] = mask[1, 5:] = True
    x = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    expected = gate(x, padding_mask=mask)
    gate.conditional_from = 2
    with torch.no_grad():
        routing = gate(x, padding_mask=mask)
    for actual, dense in ((routing.weights, expected.weights), (routing.aux, expected.aux)):
        assert_close(actual, dense, rtol=0, atol=1e-12)
    assert torch.equal(routing.weights == 0, expected.weights == 0)


def test_closed_branches_are_not_evaluated():
    gate, x = build(16, k=2, gamma=1e-3, conditional_from=2).eval(), positions(4)
    with torch.no_grad():
        expected = gate(x)
        assert torch.equal((expected.weights > 0).sum(-1), torch.full((4,), 2))
        leaves = gate.selectors(x) > 0
        nodes = torch.zeros(2, 31, dtype=torch.bool)
        order = torch.tensor(depth_first(0, 16))
        for tree, leaf in leaves.any(0).nonzero().tolist():
            node = int(order[leaf])
            while node:
                node = (node - 1) // 2
                nodes[tree, node] = True
        unused = ~nodes[:, :15], ~leaves.any(0)
        assert all(part.any() for part in unused)
        for part, weight, bias in (
            (unused[0], gate.node_weight, gate.node_bias),
            (unused[1], gate.leaf_weight, gate.leaf_bias),
        ):
            weight[part] = torch.nan
            bias[part] = torch.nan
        assert_close(gate(x).weights, expected.weights, rtol=0, atol=0)
        with torch.enable_grad():
            assert gate(x).weights.isnan().any()
        assert gate.train()(x).weights.isnan().any()
        gate.eval()
        gate.conditional_from = 17
        assert gate(x).weights.isnan().any()


@pytest.mark.fault("core F2")
def test_open_branches_of_many_experts_take_the_memory_of_the_dense_form(largest):
    tokens, dim, num_experts = 64, 256, 512
    gate, x = CometGate(dim, num_experts).eval(), torch.randn(tokens, dim)
    with torch.no_grad(), largest() as along:
        found = gate(x)
    assert (found.weights > 0).all()  # every branch is open at the start
    gate.conditional_from = num_experts + 1
    with torch.no_grad(), largest() as dense:
        expected = gate(x)
    assert dense.elements == 2 * num_experts * max(tokens, dim)  # the weights, or the scores
    assert along.elements <= max(dense.elements, comet.CHUNK)  # not 2 * tokens * num_experts * dim
    assert_close(found.weights, expected.weights, rtol=0, atol=0)


@pytest.mark.fault("core F2")
def test_copies_of_weights_are_bounded(monkeypatch, largest):
    monkeypatch.setattr(comet, "CHUNK", 2000)
    tokens, dim = 300, 64
    gate, x = CometGate(dim, 16, gamma=1e-3, conditional_from=2).eval(), torch.randn(tokens, dim)
    torch.nn.init.normal_(gate.node_weight)
    with torch.no_grad(), largest() as along:
        found = gate(x)
    assert along.elements <= max(tokens * dim, 2 * tokens * 16)  # not 2 * tokens * dim
    assert_close(found.weights, gate(x).weights)


def test_open_branches_under_autocast_and_without_positions():
    gate = build(9, dtype=torch.float32, conditional_from=2).eval()
    x = positions(30, dtype=torch.float32)
    with torch.no_grad():
        expected = gate(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(gate(x).weights, expected.weights, rtol=0, atol=0)
        half = deepcopy(gate).bfloat16()
        assert_close(half(x.bfloat16()).weights, half.float()(x.bfloat16().float()).weights)
        for shape in ((0,), (2, 0)):
            empty = gate(torch.zeros(*shape, DIM))
            assert (empty.weights.shape, empty.aux["entropy"]) == ((*shape, 9), 0)
        ignored = gate(x[:2], padding_mask=torch.ones(2, dtype=torch.bool))
        assert not ignored.weights.any()
        assert ignored.aux["entropy"] == 0
        with pytest.raises(ValueError, match=r"x \(3, 7\) must end in the 6 features"):
            gate(torch.zeros(3, 7))


def test_nan_shows():
    gate = build(9, dtype=torch.float32).eval()
    x = positions(3, dtype=torch.float32)
    x[1, 0] = torch.nan
    for conditional_from in (512, 2):
        gate.conditional_from = conditional_from
        with torch.no_grad():
            weights = gate(x).weights
        assert weights.isnan().any(-1).tolist() == [False, True, False]


def test_prob_floor_closes_leaves_and_bounds_the_entropy():
    plain, floored = (build(5, k=1, gamma=6.0, prob_floor=f) for f in (0.0, 0.1))
    x = positions(50)
    turns = torch.einsum("td,nd->tn", x, plain.node_weight[0]) + plain.node_bias[0]
    place = (turns / 6).clamp(-0.5, 0.5)
    leaves = leaf_probabilities(-2 * place**3 + 1.5 * place + 0.5)
    assert torch.equal(floored(x).weights > 0, leaves > 0.1)
    raised = leaves.clamp(min=0.1)
    entropy = -(raised * (raised + 1e-6).log()).sum(-1).mean()
    assert_close(floored(x).aux["entropy"], entropy)


@pytest.mark.parametrize("node_bias", [True, False])
def test_start(node_bias):
    gate = CometGate(200, 9, k=3, gamma=5.0, node_bias=node_bias)
    assert 0.045 < gate.node_weight.abs().max() <= 0.05
    assert 0.045 < gate.leaf_weight.abs().max() <= 0.05
    assert (gate.node_bias is None, gate.leaf_bias.any()) == (not node_bias, node_bias)
    assert (gate(torch.randn(50, 200)).weights > 0).all()
