import pytest
import torch
from torch.testing import assert_close

from core_gates.gates.gshard import GShardGate
from tests.core_gates.drawn import identity_gate

GOLDEN = ["top2_capacity_T24_E6_all_bpr_normbefore", "top2_capacity_T24_E6_all_mask"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights_capacity_loss_and_gradients(golden, name):
    g = golden(name)
    gate = identity_gate(
        GShardGate,
        6,
        second_policy="all",
        capacity_rule="per_expert",
        prioritized="batch_prioritized_routing" in g,
        normalize_before_drop="normalize_gate_prob_before_dropping" in g,
        padding_in_capacity=True,
        padding_in_mean=True,
    )
    logits, mask = g["logits"].requires_grad_(), g["padding_mask"]
    routing = gate(logits, padding_mask=mask)
    weights, balance = routing.to_dense().weights, routing.aux["balance"]
    kept = routing._replace(weights=torch.ones_like(routing.weights)).to_dense().weights != 0
    assert torch.equal(kept, g["slot"] >= 0)
    assert_close((weights, balance), (g["gate"], g["l_aux"]), rtol=0, atol=1e-10)
    of_gate = torch.autograd.grad((weights * g["cotangent"]).sum(), logits, retain_graph=True)[0]
    assert_close(of_gate, g["grad_logits_gate"], rtol=0, atol=1e-10)
    assert_close(torch.autograd.grad(balance, logits)[0], g["grad_logits_aux"], rtol=0, atol=1e-10)


def test_random_second_is_kept_with_twice_its_weight():
    gate = identity_gate(GShardGate, 3, capacity_factor=None, eval_capacity_factor=None)
    x = torch.tensor([[0.8, 0.15, 0.05]], dtype=torch.float64).log().expand(20_000, -1)
    share = 0.15 / 0.95
    noise = 2 * share + torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    routing = gate(x[:2], noise=noise)
    assert routing.kept.tolist() == [[True, True], [True, False]]
    assert_close(routing.weights, torch.tensor([[1 - share, share], [1, 0]], dtype=torch.float64))
    torch.manual_seed(0)
    assert gate(x).kept[:, 1].double().mean() == pytest.approx(2 * share, abs=0.015)
    assert gate.eval()(x).kept is None


def test_sampled_second_follows_the_probabilities_of_the_others():
    gate = identity_gate(GShardGate, 3, second_policy="sampling", capacity_factor=None)
    x = torch.tensor([[0.7, 0.1, 0.2]], dtype=torch.float64).log().expand(20_000, -1)
    torch.manual_seed(0)
    routing = gate(x)
    assert (routing.indices[:, 0] == 0).all()
    shares = torch.bincount(routing.indices[:, 1], minlength=3) / 20_000
    assert_close(shares, torch.tensor([0, 1 / 3, 2 / 3]), rtol=0, atol=0.015)
    assert (gate.eval()(x).indices == torch.tensor([0, 2])).all()


def test_a_second_choice_that_was_not_drawn_takes_no_place():
    gate = identity_gate(GShardGate, 2, capacity_factor=1.5)  # two tokens: capacity 2
    x = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert gate(x, noise=torch.tensor([0.999, 0.0])).kept.tolist() == [[True, False], [True, True]]


def test_first_choices_come_before_second_ones():
    gate = identity_gate(GShardGate, 2, second_policy="all", capacity_factor=1.0)
    routing = gate(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert routing.kept.tolist() == [[True, False], [True, False]]
    assert_close(routing.weights, torch.eye(2, dtype=torch.float64)[[0, 0]])


def test_priority_decides_who_is_dropped():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    options = {"second_policy": "all", "capacity_factor": 1.0}
    in_order, by_score = (
        identity_gate(GShardGate, 2, prioritized=p, **options) for p in (False, True)
    )
    assert in_order(x).kept[:3, 0].tolist() == [True, True, False]
    assert by_score(x).kept[:3, 0].tolist() == [False, True, True]


@pytest.mark.fault("core F9")
def test_training_and_evaluation_have_rules_of_their_own():
    options = {"second_policy": "all", "capacity_factor": 1.0, "eval_capacity_factor": 1.0}
    gate = identity_gate(
        GShardGate, 2, capacity_rule="floor", eval_capacity_rule="per_token", **options
    )
    x = torch.tensor([[1.0, 0.0]]).double().expand(9, -1)
    assert gate.train()(x).kept.sum(0).tolist() == [4, 4]
    assert gate.eval()(x).kept.sum(0).tolist() == [9, 9]


@pytest.mark.fault("core F9")
def test_padding_counts_in_the_capacity_and_in_the_mean_apart():
    x = torch.tensor([[1.0, 0.0]]).double().expand(8, -1)
    mask = torch.arange(8) >= 4
    options = {"second_policy": "all", "capacity_factor": 1.0}
    found = {}
    for name in ("neither", "padding_in_capacity", "padding_in_mean"):
        extra = {} if name == "neither" else {name: True}
        routing = identity_gate(GShardGate, 2, **options, **extra)(x, padding_mask=mask)
        found[name] = (int(routing.kept[:, 0].sum()), routing.aux["balance"].item())
    assert found["neither"][0] == found["padding_in_mean"][0] == 2
    assert found["padding_in_capacity"][0] == 4
    assert found["padding_in_capacity"][1] == found["neither"][1]
    # Padding adds its probabilities, but no choice: half the fraction of first choices.
    assert found["padding_in_mean"][1] == pytest.approx(found["neither"][1] / 2)


def test_loss_is_one_if_balanced_and_excludes_padding_by_default():
    gate = identity_gate(GShardGate, 2, second_policy="all")
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([False, False, True])
    assert gate(x, padding_mask=mask).aux["balance"].item() == pytest.approx(1)
    assert gate(x).aux["balance"] > 1.1
    assert gate(x[:0]).aux["balance"] == 0
