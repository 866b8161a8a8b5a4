from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from core_gates.training.proximal import ProximalAdamW

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora" / "sora.npz"


@pytest.fixture(scope="module")
def sora():
    with np.load(GOLDEN) as arrays:
        return {
            key: str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
            for key, value in arrays.items()
        }


def trajectory(sora, i, prox):
    """The gate after each step with the learning rates and thresholds of the file."""
    gate = nn.Parameter(sora[f"opt{i}_p0"].clone())
    options = {"weight_decay": float(sora[f"opt{i}_wd"]), "threshold": sora[f"opt{i}_mode"]}
    optimizer = ProximalAdamW([gate], 1.0, xi=0.0, prox=prox, **options)
    values = []
    for grad, lr, xi in zip(
        *(sora[f"opt{i}_{name}"] for name in ("grads", "lrs", "lambdas")), strict=True
    ):
        optimizer.param_groups[0] |= {"lr": float(lr), "xi": float(xi)}
        gate.grad = grad
        optimizer.step()
        values.append(gate.detach().clone())
    return torch.stack(values)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize(("prox", "name"), [("soft", "soft_threshold"), ("reference", "reference")])
def test_golden_trajectories(sora, i, prox, name):
    expected = sora[f"opt{i}_traj_{name}"]
    actual = trajectory(sora, i, prox)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(actual == 0, expected == 0)


def test_golden_reference_threshold(sora):
    """A step without gradient is the threshold alone."""
    gate = nn.Parameter(sora["prox_in"].clone())
    optimizer = ProximalAdamW([gate], xi=float(sora["prox_lambda"]), prox="reference")
    gate.grad = torch.zeros_like(gate)
    optimizer.step()
    assert_close(gate.data, sora["prox_reference"], rtol=0, atol=1e-15)


def two_groups(**gates):
    torch.manual_seed(0)
    weight, gate = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))
    groups = [
        {"params": [weight], "weight_decay": 0.1},
        {"params": [gate], "lr": 0.02, "xi": 0.05} | gates,
    ]
    return weight, gate, ProximalAdamW(groups, lr=0.01)


def test_one_optimizer_with_two_kinds_of_groups():
    weight, gate, optimizer = two_groups()
    for p in (weight, gate):
        p.grad = torch.zeros_like(p)
    before = weight.detach().clone(), gate.detach().clone()
    optimizer.step()
    assert_close(weight.data, before[0] * (1 - 0.01 * 0.1))
    assert_close(gate.data, before[1].sign() * (before[1].abs() - 0.05).clamp(min=0))


def test_a_plain_group_is_adamw_up_to_epsilon():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 5).double()) for _ in range(2))
    optimizers = (
        ProximalAdamW([ours], lr=0.1, eps=0.0, weight_decay=0.2),
        torch.optim.AdamW([theirs], lr=0.1, eps=0.0, weight_decay=0.2),
    )
    for _ in range(5):
        grad = torch.randn(5).double()
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_lr_scaled_thresholds_follow_the_learning_rate():
    gate = nn.Parameter(torch.tensor([1.0, -1.0, 0.01], dtype=torch.float64))
    optimizer = ProximalAdamW([gate], xi=0.5, threshold="lr_scaled")
    for lr in (0.1, 0.05, 0.02):
        optimizer.param_groups[0]["lr"] = lr
        gate.grad = torch.zeros_like(gate)
        optimizer.step()
    expected = torch.tensor([1 - 0.5 * 0.17, -1 + 0.5 * 0.17, 0], dtype=torch.float64)
    assert_close(gate.data, expected, rtol=0, atol=1e-12)


def test_useless_gates_die_and_useful_ones_live():
    torch.manual_seed(0)
    x, wanted = torch.randn(256, 8), torch.tensor([1.0, -1, 0.5, 0, 0, 0, 0, 0])
    zeros = []
    for xi in (None, 3e-3):
        gate = nn.Parameter(torch.ones(8))
        optimizer = ProximalAdamW([gate], lr=0.02, xi=xi)
        for step in range(500):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 500)
            optimizer.zero_grad()
            ((x * (gate - wanted)).sum(-1) ** 2).mean().backward()
            optimizer.step()
        zeros.append((gate == 0).tolist())
    assert not any(zeros[0])
    assert zeros[1] == (wanted == 0).tolist()


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_retained_gates_never_grow_with_xi(values, first, second):
    retained = []
    for xi in sorted((first, second)):
        gate = nn.Parameter(torch.tensor(values))
        optimizer = ProximalAdamW([gate], xi=xi)
        for _ in range(3):
            gate.grad = torch.zeros_like(gate)
            optimizer.step()
        retained.append(int((gate != 0).sum()))
    assert retained[0] >= retained[1]


def test_a_dead_gate_can_revive():
    gate = nn.Parameter(torch.zeros(2))
    optimizer = ProximalAdamW([gate], lr=0.1, eps=1e-12, xi=0.03)
    gate.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert_close(gate.data, torch.tensor([-0.07, 0.0]), rtol=0, atol=1e-6)


def test_many_gates_of_different_shapes_are_thresholded_each():
    gates = [nn.Parameter(torch.full(shape, 1.0)) for shape in ((3,), (1, 2), ())]
    optimizer = ProximalAdamW(gates, xi=0.25)
    for gate in gates[:2]:
        gate.grad = torch.zeros_like(gate)
    optimizer.step()
    assert [g.detach().max().item() for g in gates] == [0.75, 0.75, 1.0]  # no gradient, no step


def test_it_resumes_bit_for_bit_with_its_threshold():
    weight, gate, optimizer = two_groups(threshold="lr_scaled")
    copies = [nn.Parameter(p.detach().clone()) for p in (weight, gate)]

    def run(parameters, optimizer, steps):
        for t in steps:
            for p in parameters:
                p.grad = torch.full_like(p, 0.1 * (t + 1))
            optimizer.param_groups[1]["xi"] += 0.01
            optimizer.step()

    run((weight, gate), optimizer, range(3))
    state = deepcopy(optimizer.state_dict())
    for copied, p in zip(copies, (weight, gate), strict=True):
        copied.data.copy_(p.data)
    resumed = ProximalAdamW([{"params": [p]} for p in copies])
    resumed.load_state_dict(state)
    assert resumed.param_groups[1]["xi"] == pytest.approx(0.08)
    run((weight, gate), optimizer, range(3, 6))
    run(copies, resumed, range(3, 6))
    for copied, p in zip(copies, (weight, gate), strict=True):
        assert torch.equal(copied, p)


def test_it_works_with_schedulers_closures_and_a_gradient_scaler():
    weight, gate, optimizer = two_groups()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(weight.square().sum() + gate.square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"xi": -0.1}, "xi must not be negative, got -0.1; None means no threshold"),
        ({"threshold": "adaptive"}, "threshold is 'adaptive'; choose one of constant, lr_scaled"),
        ({"prox": "hard"}, "prox is 'hard'; choose one of soft, reference"),
    ],
)
def test_settings_are_checked(options, message):
    gate = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        ProximalAdamW([gate], **options)
    with pytest.raises(ValueError, match=message):
        ProximalAdamW([{"params": [gate]} | options])
