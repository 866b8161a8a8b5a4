import pytest
import torch
from torch.testing import assert_close

from core_gates import SwitchGate, balance_loss
from tests.core_gates.drawn import identity_gate

STANDARD = ["standard_T24_E6_k2", "standard_T32_E8_k3"]


def assert_slots(routing, slots):
    """Check which choices fit against places (T, E) in the buffers, -1 for none."""
    routed = routing._replace(weights=torch.ones_like(routing.weights)).to_dense().weights != 0
    assert torch.equal(routed, slots >= 0)


@pytest.mark.fault("core F9")
def test_training_and_evaluation_have_rules_of_their_own():
    gate = identity_gate(
        SwitchGate,
        2,
        jitter=0,
        capacity_factor=1.0,
        eval_capacity_factor=0.5,
        capacity_rule="per_expert",
        eval_capacity_rule="per_token",
    )
    x = torch.tensor([[1.0, 0.0]]).double().expand(10, -1)
    assert gate.train()(x).kept.sum() == 5  # ⌈10 / 2⌉
    assert gate.eval()(x).kept.sum() == 5  # ⌈0.5 · 10⌉
    gate.eval_capacity_rule = "floor"
    assert gate.eval()(x).kept.sum() == 2
    assert (
        identity_gate(SwitchGate, 2, jitter=0, capacity_rule="floor").eval_capacity_rule == "floor"
    )


@pytest.mark.parametrize("name", STANDARD)
def test_golden_weights_and_balance_loss(golden, name):
    g = golden(name)
    routing = identity_gate(SwitchGate, g["logits"].shape[1], jitter=0)(g["logits"])
    assert_close(routing.to_dense().weights, g["switch_gate"], rtol=0, atol=1e-10)
    assert_close(balance_loss(routing), g["switch_lb_loss"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["top1_capacity_T24_E6_cf1", "top1_capacity_T24_E6_eval"])
def test_golden_capacity_and_gradients(golden, name):
    g = golden(name)
    gate = identity_gate(
        SwitchGate,
        6,
        jitter=0,
        capacity_factor=1.0,
        eval_capacity_factor=0.25,
        capacity_rule="per_token" if "eval_mode" in g else "per_expert",
    ).train("eval_mode" not in g)
    logits = g["logits"].requires_grad_()
    routing = gate(logits)
    weights, balance = routing.to_dense().weights, balance_loss(routing)
    assert_slots(routing, g["slot"])
    assert_close((weights, balance), (g["gate"], g["l_aux"]), rtol=0, atol=1e-10)
    of_gate = torch.autograd.grad((weights * g["cotangent"]).sum(), logits, retain_graph=True)[0]
    assert_close(of_gate, g["grad_logits_gate"], rtol=0, atol=1e-10)
    of_loss = torch.autograd.grad(balance, logits)[0]
    assert_close(of_loss, g["grad_logits_aux"], rtol=0, atol=1e-10)


def test_capacity_depends_on_the_mode():
    gate, x = (
        identity_gate(SwitchGate, 4, jitter=0),
        torch.eye(4, dtype=torch.float64)[:1].expand(16, 4),
    )
    assert (gate(x).kept.sum(), gate.eval()(x).kept.sum()) == (5, 8)
    unlimited = identity_gate(
        SwitchGate, 4, jitter=0, capacity_factor=None, eval_capacity_factor=None
    )
    assert unlimited(x).kept is None
    assert gate.couples_tokens
    assert not unlimited.couples_tokens


def test_groups_do_not_compete():
    gate = identity_gate(SwitchGate, 2, jitter=0, group_dim=-2)
    x = torch.eye(2, dtype=torch.float64)[torch.zeros(3, 4, dtype=torch.int64)]
    assert gate(x).kept[..., 0].tolist() == [[True, True, True, False]] * 3


def test_jitter_scales_the_input_in_training_only():
    gate = SwitchGate(3, 4, jitter=0.5)
    x = torch.randn(6, 3)
    noise = torch.rand(6, 3) * 2 - 1
    assert_close(gate(x, noise=noise).logits, x * (1 + 0.5 * noise) @ gate.weight.T)
    torch.nn.init.eye_(gate.weight)
    ratio = gate(x).logits[:, :3] / x
    assert ratio.min() >= 0.5
    assert ratio.max() <= 1.5
    assert ratio.std() > 0.1
    assert_close(gate.eval()(x).logits[:, :3], x)
