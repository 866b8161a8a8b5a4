"""The passes of every mode of gradient routing, and its arguments."""

import runpy
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates import GradientRouting, ProximalStep

NET = runpy.run_path(str(Path(__file__).with_name("routed_net.py")))
MODES, build, batch, loss_on, train, snapshot, changed, GATES, WEIGHTS = (
    NET[name]
    for name in (
        "MODES",
        "build",
        "batch",
        "loss_on",
        "train",
        "snapshot",
        "changed",
        "GATES",
        "WEIGHTS",
    )
)


def test_dual_is_the_rule_written_out():
    model, routing = build(kind=torch.optim.SGD, clip=0.3, gate_clip=0.02)
    twin = deepcopy(model)
    gates = [p for n, p in twin.named_parameters() if "gate" in n]
    weights = [p for n, p in twin.named_parameters() if "gate" not in n]
    for t in range(3):
        loss = loss_on(*batch(t))
        step = routing.step(model, loss)
        for group, clip, lr in ((gates, 0.02, 0.05), (weights, 0.3, 0.01)):
            grads = torch.autograd.grad(loss(twin), group)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            assert norm > clip
            for p, g in zip(group, grads, strict=True):
                p.data -= lr * g * clip / norm
            measured = step.gate_grad_norm if group is gates else step.grad_norm
            assert_close(measured, norm)
    assert_close(snapshot(model), snapshot(twin), rtol=1e-5, atol=1e-6)


def test_the_gate_loss_may_be_another_one():
    model, routing = build()
    x, target = batch()
    step = routing.step(model, loss_on(x, target), lambda m: 3 * F.l1_loss(m(x), target))
    twin, _ = build()
    assert_close(step.gate_loss, 3 * F.l1_loss(twin(x), target).detach())
    assert not torch.equal(step.loss, step.gate_loss)


def test_joint_moves_both_groups_from_one_pass():
    model, routing = build("joint", kind=torch.optim.SGD, clip=0.3, gate_clip=0.02)
    before = deepcopy(model)
    calls = []

    def loss(m):
        calls.append(m)
        return loss_on(*batch())(m)

    step = routing.step(model, loss)
    assert len(calls) == 1
    assert step.gate_loss is None
    loss_on(*batch())(before).backward()
    for name, clip, lr in (("gate", 0.02, 0.05), ("", 0.3, 0.01)):
        group = [
            (p, q)
            for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
            if ("gate" in n) == bool(name)
        ]
        norm = nn.utils.clip_grad_norm_([q for _, q in group], clip)
        assert_close(step.gate_grad_norm if name else step.grad_norm, norm)
        for p, q in group:
            assert_close(p.data, q.data - lr * q.grad)


def test_reference_moves_the_weights_along_the_sum_of_both_gradients():
    model, routing = build("reference", kind=torch.optim.SGD)
    loss = loss_on(*batch())
    twin = deepcopy(model)
    gates = [p for n, p in twin.named_parameters() if "gate" in n]
    weights = [p for n, p in twin.named_parameters() if "gate" not in n]
    first = torch.autograd.grad(loss(twin), [*weights, *gates])
    for gate, grad in zip(gates, first[len(weights) :], strict=True):
        gate.data -= 0.05 * grad
    second = torch.autograd.grad(loss(twin), weights)
    for p, a, b in zip(weights, first[: len(weights)], second, strict=True):
        p.data -= 0.01 * (a + b)
    routing.step(model, loss)
    assert_close(snapshot(model), snapshot(twin), rtol=1e-5, atol=1e-6)


def test_every_k_and_off():
    moved = {}
    for mode, k in (("every_k", 3), ("off", 1), ("dual", 3)):
        model, routing = build(mode, every_k=k)
        moved[mode] = []
        for t in range(5):
            before = snapshot(model)
            step = routing.step(model, loss_on(*batch(t)))
            names = changed(before, snapshot(model))
            assert (names - GATES, bool(names & GATES)) == (WEIGHTS, step.gate_loss is not None)
            moved[mode].append(bool(names & GATES))
    assert (moved["every_k"], moved["off"]) == ([True, False, False, True, False], [False] * 5)
    assert moved["dual"] == [True] * 5
    model, resumed = build("every_k", every_k=3)
    resumed.load_state_dict({"num_steps": 3})
    assert resumed.step(model, loss_on(*batch())).gate_loss is not None
    assert resumed.state_dict() == {"num_steps": 4}


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_equals_one_batch(mode):
    whole, routing = build(mode, dtype=torch.float64, clip=0.5, gate_clip=0.1)
    parts, routing_of_parts = build(mode, dtype=torch.float64, clip=0.5, gate_clip=0.1)
    for t in range(3):
        x, target = batch(t, 8, torch.float64)
        one = routing.step(whole, loss_on(x, target))
        four = routing_of_parts.step(
            parts, [loss_on(*pair) for pair in zip(x.split(2), target.split(2), strict=True)]
        )
        for a, b in zip(one, four, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a.double(), b.double(), rtol=1e-10)
    assert_close(snapshot(parts), snapshot(whole), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode is 'both'; choose one of dual, reference, joint, every_k, off"),
        ({"clip": 0.0}, r"clip must be positive, got 0\.0"),
        ({"gate_clip": -1.0}, r"gate_clip must be positive, got -1\.0"),
        ({"every_k": 0}, "every_k must be positive, got 0"),
        ({"gate_optimizer": None}, "mode 'dual' needs a gate_optimizer"),
    ],
)
def test_arguments_are_checked(refuses, options, message):
    _, routing = build()
    arguments = {"optimizer": routing.optimizer, "gate_optimizer": routing.gate_optimizer}
    refuses(ValueError, (message, lambda: GradientRouting(**arguments | options)))


def test_optimizers_must_not_share_parameters_and_batches_not_be_empty(refuses):
    model, routing = build()
    everything = torch.optim.Adam(model.parameters())
    refuses(
        ValueError,
        (
            "2 parameters are in both optimizers",
            lambda: GradientRouting(everything, routing.gate_optimizer),
        ),
        ("at least one micro-batch", lambda: routing.step(model, [])),
    )


def test_mode_off_needs_no_gates():
    model = nn.Linear(3, 2)
    routing = GradientRouting(torch.optim.SGD(model.parameters(), 0.1), None, mode="off")
    before = snapshot(model)
    assert routing.step(model, loss_on(*batch())).grad_norm is None
    assert changed(before, snapshot(model)) == {"weight", "bias"}


def test_gates_and_optimizer_with_proximal_steps_work_together():
    model, routing = build()
    ProximalStep(routing.gate_optimizer, routing.gates, 10.0)
    train(model, routing, 1)
    assert not model.gate.logits.any()
    assert model.first.weight.all()
