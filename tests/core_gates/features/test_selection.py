from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates import FeatureSelectionGate, GateMonitor, HardAttentionGate
from core_gates.features.low_rank import HARD_CONCRETE

RECTIFIERS = ["sigmoid", "relu", "hard_concrete", "straight_through"]


def gate_of(logits, rectifier="sigmoid", **options):
    gate = FeatureSelectionGate(len(logits), rectifier=rectifier, dtype=torch.float64, **options)
    gate.logits.data.copy_(torch.tensor(logits, dtype=torch.float64))
    return gate


@pytest.mark.parametrize(
    ("rectifier", "expected"),
    [
        ("sigmoid", [0.047425873, 0.5, 0.880797078]),
        ("relu", [0.0, 0.0, 2.0]),
        ("hard_concrete", [0.0, 0.5, 0.956956493]),
        ("straight_through", [0.0, 0.0, 1.0]),
    ],
)
def test_scores(rectifier, expected):
    gate = gate_of([-3.0, 0.0, 2.0], rectifier).eval()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(gate.scores(), expected, rtol=0, atol=1e-9)
    assert_close(gate(x), x * expected, rtol=0, atol=1e-8)
    assert_close(gate.gate_values(x), gate.scores())


@pytest.mark.parametrize("rectifier", ["sigmoid", "relu", "hard_concrete"])
def test_gradients(rectifier):
    gate = gate_of([-0.4, 0.3, 1.0], rectifier).eval()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    call = torch.func.functional_call
    assert gradcheck(lambda x, g: call(gate, {"logits": g}, (x,)), (x, gate.logits))


def test_a_straight_through_gate_is_binary_with_the_gradient_of_the_sigmoid():
    gate, soft = gate_of([-3.0, 0.5], "straight_through"), gate_of([-3.0, 0.5])
    x = torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(gate(x)[:, 0], torch.zeros(5, dtype=torch.float64))
    for g in (gate, soft):
        g(x).sum().backward()
    assert_close(gate.logits.grad, soft.logits.grad)


def test_images_and_tokens():
    gate = FeatureSelectionGate(3, feature_dim=1)
    x = torch.randn(2, 3, 4, 5)
    assert_close(gate(x), x * gate.scores().view(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"x \(2, 4\) must have 3 features in dimension 1"):
        gate(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("init", "std"), [("xavier", (2 / 4097) ** 0.5), ("he", (2 / 4096) ** 0.5)]
)
def test_gates_start_half_open(init, std):
    torch.manual_seed(0)
    gate = FeatureSelectionGate(4096, init=init)
    torch.manual_seed(0)
    assert_close(gate.logits, torch.randn(4096) * std)
    assert abs(gate.scores().mean().item() - 0.5) < 1e-3
    torch.manual_seed(0)
    again = FeatureSelectionGate(4096, init=init, device="meta").to_empty(device="cpu")
    again.reset_parameters()
    assert torch.equal(gate.logits, again.logits)
    assert again.kept.all()


def test_a_number_starts_every_gate_alike():
    assert_close(FeatureSelectionGate(3, rectifier="relu", init=1.0).scores(), torch.ones(3))


def test_hard_concrete_samples_in_training_only():
    torch.manual_seed(0)
    gate = FeatureSelectionGate(2000, rectifier="hard_concrete", init=-1.0)
    x = torch.ones(3, 2000)
    state = torch.get_rng_state()
    assert_close((gate.eval()(x), torch.get_rng_state()), (gate(x), state), rtol=0, atol=0)
    y = gate.train()(x)
    assert torch.equal(y[0], y[2])  # one sample for the batch
    assert not torch.equal(gate(x), y)
    share_open = (y[0] > 0).float().mean()
    assert_close(share_open, HARD_CONCRETE.open_probability(torch.tensor(-1.0)), rtol=0, atol=0.03)
    assert_close(gate.l0_penalty() / 2000, HARD_CONCRETE.open_probability(torch.tensor(-1.0)))


def test_closed_form_of_the_hard_concrete_distribution():
    """P(z = 0) is P(concrete <= -γ / (ζ - γ)), where the logistic quantile is known."""
    log_alpha = torch.linspace(-3, 3, 7, dtype=torch.float64)
    edge = torch.tensor(0.1 / 1.2, dtype=torch.float64)
    closed = torch.sigmoid(2 / 3 * (edge / (1 - edge)).log() - log_alpha)
    assert_close(HARD_CONCRETE.open_probability(log_alpha), 1 - closed)
    for nudge, is_open in ((-1e-6, False), (1e-6, True)):
        assert ((HARD_CONCRETE.sample(log_alpha, closed + nudge) > 0) == is_open).all()


@pytest.mark.parametrize("rectifier", ["sigmoid", "relu"])
def test_gates_that_never_close_by_chance_have_no_l0_penalty(rectifier):
    with pytest.raises(ValueError, match=f"not rectifier '{rectifier}'"):
        FeatureSelectionGate(3, rectifier=rectifier).l0_penalty()


def test_the_l0_penalty_of_a_straight_through_gate_counts_its_soft_scores():
    gate = gate_of([-1.0, 2.0], "straight_through")
    assert_close(gate.l0_penalty(), gate.logits.sigmoid().sum())
    gate.prune_(0.5)
    assert_close(gate.l0_penalty(), gate.logits[1].sigmoid())


@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_pruned_gates_stay_closed(rectifier):
    gate = gate_of([-3.0, 0.8, 2.0], rectifier)
    assert gate.prune_(0.1) == 2
    x = torch.randn(4, 3, dtype=torch.float64)
    (gate.train()(x) ** 2).sum().backward()
    assert gate.logits.grad[0] == 0
    gate.logits.data.fill_(5.0)
    copy = FeatureSelectionGate(3, rectifier=rectifier, dtype=torch.float64)
    copy.load_state_dict(gate.state_dict())
    for g in (gate, copy, deepcopy(gate)):
        assert (g(x)[:, 0] == 0).all()
        assert (g(x)[:, 1:] != 0).all()


def test_pruning_exact_zeros_changes_nothing():
    gate = gate_of([-3.0, 0.8, 2.0], "hard_concrete").eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    before = gate(x)
    assert gate.prune_() == 2
    assert torch.equal(gate(x), before)


@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize(
    ("module", "side", "shape"),
    [
        (nn.Linear(5, 4), "output", (3, 5)),
        (nn.Linear(4, 2, bias=False), "input", (3, 4)),
        (nn.Conv2d(6, 4, 3, groups=2), "output", (2, 6, 5, 5)),
        (nn.Conv2d(4, 3, 3), "input", (2, 4, 5, 5)),
        (nn.Conv1d(4, 3, 1), "input", (2, 4, 5)),
        (nn.LayerNorm(4), "output", (2, 4)),
        (nn.RMSNorm(4), "output", (2, 4)),
        (nn.BatchNorm2d(4), "output", (2, 4, 3, 3)),
    ],
    ids=str,
)
def test_folding_is_exact(rectifier, module, side, shape):
    module = deepcopy(module).double().eval()
    gate = gate_of([-1.0, 0.3, 2.0, 0.7], rectifier, feature_dim=1 if len(shape) > 2 else -1).eval()
    x = torch.randn(shape, dtype=torch.float64)
    gated = gate(module(x)) if side == "output" else module(gate(x))
    plain = module(x)
    gate.fold_into(module, side)
    assert_close(module(x), gated, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(plain, gated, rtol=1e-3)


@pytest.mark.parametrize(
    ("module", "side", "message"),
    [
        (nn.GELU(), "output", "GELU cannot absorb scores"),
        (nn.LayerNorm(4, elementwise_affine=False), "output", "LayerNorm cannot absorb"),
        (nn.LayerNorm(4), "input", "LayerNorm cannot absorb scores"),
        (nn.ConvTranspose2d(4, 4, 2), "output", "ConvTranspose2d cannot absorb"),
        (nn.Conv2d(4, 4, 1, groups=2), "input", "Conv2d has 2 groups"),
        (nn.Linear(4, 3), "output", "Linear has 3 outputs, not 4"),
        (nn.Linear(3, 4), "input", "Linear has 3 inputs, not 4"),
        (nn.Linear(4, 4), "left", "side is 'left'; choose one of output, input"),
    ],
    ids=str,
)
def test_folding_refuses_what_it_cannot_do(refuses, module, side, message):
    refuses(ValueError, (message, lambda: gate_of([0.0] * 4).fold_into(module, side)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 2, "rectifier": "tanh"}, "rectifier is 'tanh'; choose one of sigmoid, relu"),
        ({"dim": 2, "init": "zeros"}, "init is 'zeros'; choose xavier, he or a number"),
    ],
)
def test_arguments_are_checked(refuses, options, message):
    refuses(ValueError, (message, lambda: FeatureSelectionGate(**options)))


def test_half_precision_inputs_keep_their_dtype():
    gate = FeatureSelectionGate(4)
    assert gate(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (gate.to(torch.bfloat16).scores().dtype, gate.kept.dtype) == (torch.float32, torch.bool)


def test_both_names_are_one_gate_and_the_monitor_sees_it():
    assert HardAttentionGate is FeatureSelectionGate
    model = nn.Sequential(FeatureSelectionGate(4, init=0.0))
    monitor = GateMonitor(model)
    model(torch.ones(2, 4))
    assert monitor.compute()["0"]["mean"] == 0.5
    assert "rectifier=sigmoid" in repr(model)
