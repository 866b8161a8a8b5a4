import pytest
import torch
from torch.testing import assert_close

from core_gates.gates.expert_choice import ExpertChoiceGate
from tests.core_gates.drawn import identity_gate, randn


@pytest.mark.parametrize("name", ["standard_T24_E6_k2", "standard_T32_E8_k3"])
def test_golden_choices_and_weights(golden, name):
    g = golden(name)
    num_tokens, num_experts = g["logits"].shape
    capacity = int(g["expert_choice_capacity"])
    gate = identity_gate(
        ExpertChoiceGate, num_experts, capacity_factor=capacity * num_experts / num_tokens
    )
    weights = gate(g["logits"]).weights
    assert_close(weights, g["expert_choice_gate"], rtol=0, atol=1e-10)
    taken = [set(column.nonzero().flatten().tolist()) for column in weights.T]
    assert taken == [set(row.tolist()) for row in g["expert_choice_index"]]


def test_gradient_is_that_of_the_softmax_where_an_expert_took_the_position():
    gate, x = identity_gate(ExpertChoiceGate, 4, capacity_factor=1.0), randn(8, 4).requires_grad_()
    routing = gate(x)
    cotangent = randn(8, 4)
    chosen = routing.weights.detach() != 0
    found = torch.autograd.grad((routing.weights * cotangent).sum(), x)[0]
    p = x.detach().softmax(-1)
    inner = cotangent * chosen
    assert_close(found, p * (inner - (p * inner).sum(-1, keepdim=True)))


@pytest.mark.parametrize(
    ("rule", "load"), [("ceil", 6), ("floor", 5), ("per_expert", 6), ("per_token", 10)]
)
def test_capacity_rules(rule, load):
    factor = 1.0 if rule == "per_token" else 2.0
    gate = identity_gate(ExpertChoiceGate, 4, capacity_factor=factor, capacity_rule=rule)
    x = randn(11, 4)[: 10 if rule == "per_token" else 11]
    assert gate(x).chosen().sum(0).tolist() == [load] * 4
    padded = torch.cat([x, x[:3]])
    mask = torch.arange(len(padded)) >= len(x)
    assert gate(padded, padding_mask=mask).chosen().sum(0).tolist() == [load] * 4


def test_equal_scores_go_to_the_first_position():
    routing = identity_gate(ExpertChoiceGate, 4, capacity_factor=1.0)(
        torch.zeros(8, 4, dtype=torch.float64)
    )
    assert routing.chosen()[:2].all()
    assert not routing.chosen()[2:].any()


def test_groups_choose_for_themselves():
    gate, x = (
        identity_gate(ExpertChoiceGate, 3, group_dim=1, capacity_factor=1.0),
        randn(2, 6, 5, 3),
    )
    weights = gate(x).weights
    for b in range(2):
        for h in range(5):
            alone = identity_gate(ExpertChoiceGate, 3, capacity_factor=1.0)(x[b, :, h]).weights
            assert_close(weights[b, :, h], alone, rtol=0, atol=0)


@pytest.mark.fault("core F9")
def test_training_and_evaluation_have_capacities_of_their_own():
    options = {"eval_capacity_factor": 1.1, "eval_capacity_rule": "floor"}
    gate, x = (
        identity_gate(ExpertChoiceGate, 2, capacity_factor=0.5, **options),
        torch.eye(2).repeat(5, 1).double(),
    )
    assert gate.train()(x).chosen().sum(0).tolist() == [3, 3]
    assert gate.eval()(x).chosen().sum(0).tolist() == [5, 5]
    alike = identity_gate(ExpertChoiceGate, 2, capacity_factor=0.5).eval()
    assert alike(x).chosen().sum(0).tolist() == [3, 3]
    with pytest.raises(ValueError, match="capacity_factor must be positive"):
        identity_gate(ExpertChoiceGate, 2, eval_capacity_factor=0.0)


@pytest.mark.parametrize("padding_in_capacity", [False, True])
def test_capacity_excludes_padding_by_default(padding_in_capacity):
    x, mask = randn(2, 6, 3), torch.tensor([[False] * 6, [False, False] + [True] * 4])
    gate = identity_gate(
        ExpertChoiceGate,
        3,
        capacity_factor=1.5,
        group_dim=-2,
        padding_in_capacity=padding_in_capacity,
    )
    chosen = gate(x.masked_fill(mask.unsqueeze(-1), 9), padding_mask=mask).chosen()
    # Three of six, and half of two; if padding counts, both of the two.
    assert chosen.sum(1).tolist() == [[3] * 3, [2 if padding_in_capacity else 1] * 3]
