import pytest
import torch
from torch import distributed as dist
from torch.testing import assert_close

from core_gates import ReMoEGate, update_gates
from tests.core_gates.drawn import identity_gate

GOLDEN = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_losses_and_next_penalty(golden, name):
    g = golden(name)
    for load_balanced, expected in ((False, "remoe_l1"), (True, "remoe_l1_lb")):
        gate = identity_gate(
            ReMoEGate, g["logits"].shape[1], bias=True, k=int(g["k"]), load_balanced=load_balanced
        )
        gate.bias.data.fill_(-0.8)
        routing = gate(g["logits"])
        update_gates(gate)
        assert_close(routing.weights, g["remoe_gate"], rtol=0, atol=1e-10)
        share = (routing.weights == 0).double().mean()
        assert_close(share, g["remoe_sparsity"], rtol=0, atol=1e-10)
        assert_close(routing.aux["l1"], 1e-8 * g[expected], rtol=1e-10, atol=0)
        assert_close(gate.penalty, g["remoe_lambda_next_from_1e8"], rtol=1e-10, atol=0)


def test_loss_presses_busy_experts_without_a_gradient_of_the_share():
    gate = identity_gate(ReMoEGate, 2, bias=True, k=1, initial_penalty=1.0)
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    gate(x).aux["l1"].backward()
    # fractions 1 and 1/2, times E / k = 2, over 2 tokens
    assert_close(x.grad, torch.tensor([[1.0, 0.5], [1.0, 0.0]], dtype=torch.float64))


def penalties(gate, x, steps=1):
    for _ in range(steps):
        for micro_batch in x:
            gate(micro_batch)
        update_gates(gate)
    return gate.penalty.item()


def test_penalty_rises_falls_and_rests():
    for row, factor in {(1.0, 1.0): 1.2, (-1.0, -1.0): 1 / 1.2, (1.0, -1.0): 1.0}.items():
        gate = identity_gate(ReMoEGate, 2, bias=True, k=1, initial_penalty=0.5)
        assert penalties(gate, [torch.tensor([row, row])]) == pytest.approx(0.5 * factor)


def test_penalty_sees_all_micro_batches_but_no_padding_nothing_empty_and_no_nan():
    gate = identity_gate(ReMoEGate, 2, bias=True, k=1, initial_penalty=1.0)
    busy, quiet = torch.ones(3, 2), -torch.ones(2, 2)
    assert penalties(gate, [quiet, busy]) == pytest.approx(1.2)
    gate.reset_parameters()
    gate.weight.data.copy_(torch.eye(2))
    gate(busy, padding_mask=torch.tensor([True, True, False]))
    gate(quiet)
    gate(torch.full((4, 2), torch.nan))
    update_gates(gate)
    assert gate.penalty.item() == pytest.approx(1 / 1.2)
    assert penalties(gate, [torch.ones(0, 2)]) == pytest.approx(1 / 1.2)


def test_penalty_stays_where_it_can_turn_back():
    gate = identity_gate(ReMoEGate, 2, bias=True, k=1)
    assert penalties(gate, [-torch.ones(1, 2)], steps=300) == pytest.approx(1e-16)
    assert penalties(gate, [torch.ones(1, 2)]) > 1e-16


def test_a_closed_gate_has_no_gradient_that_opens_it():
    gate = ReMoEGate(8, 4)
    torch.nn.init.constant_(gate.weight, -1e-3)
    for value, opened in ((-1e-3, False), (1e-3, True)):  # one expert, of tokens above zero
        gate.weight.data[0] = value
        gate.zero_grad()
        (gate(torch.rand(16, 8)).weights - 1).square().sum().backward()
        assert bool(gate.weight.grad[0].any()) == opened
        assert not gate.weight.grad[1:].any()


def test_training_holds_the_active_experts_at_k():
    torch.manual_seed(0)
    gate = ReMoEGate(8, 8, k=2, initial_penalty=1e-3, rate=1.05, bias=True)
    torch.nn.init.normal_(gate.weight)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    active = []
    for _ in range(400):
        routing = gate(torch.randn(64, 8))
        task = (routing.weights - 1).square().mean()  # on its own, it opens every expert
        optimizer.zero_grad()
        (task + routing.aux["l1"]).backward()
        optimizer.step()
        update_gates(gate)
        active.append((routing.weights > 0).sum(-1).float().mean().item())
    assert active[0] > 3.5
    assert sum(active[-200:]) / 200 == pytest.approx(2, abs=0.15)


def test_scores_are_a_distribution_at_real_positions():
    gate = identity_gate(ReMoEGate, 3, bias=True)
    x = torch.tensor([[3.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    probs = gate(x, padding_mask=torch.tensor([False, False, True])).probs
    expected = torch.tensor([[0.75, 0.25, 0.0], [1 / 3] * 3, [0.0] * 3], dtype=torch.float64)
    assert_close(probs, expected)


def penalty_of_rank(x, sizes):
    gate = identity_gate(ReMoEGate, 3, bias=True, k=1, initial_penalty=1.0)
    return penalties(gate, [x.split(sizes)[dist.get_rank()] if dist.is_initialized() else x])


def test_sparsity_of_two_ranks_equals_one_process(ranks):
    x = torch.cat([torch.ones(5, 3), -torch.ones(2, 3)])
    assert penalty_of_rank(x[5:], None) < 1
    expected = penalty_of_rank(x, None)
    assert expected == pytest.approx(1.2)
    assert ranks(penalty_of_rank, x, [5, 2]) == [expected, expected]
