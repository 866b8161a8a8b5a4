"""Gradient routing of models with frozen weights or gates."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

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


def frozen(mode, *, weights=False, gates=False, **options):
    """A model whose weights or gates do not learn, and its routing."""
    model, routing = build(mode, **options)
    for name, parameter in model.named_parameters():
        if gates if "gate" in name else weights:
            parameter.requires_grad_(False)
    return model, routing


@pytest.mark.fault("core A16")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_gates_learn_while_all_weights_are_frozen(mode, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, routing = frozen(mode, weights=True, clip=10.0, gate_clip=10.0, scaler=scaler)
    before = snapshot(model)
    steps = train(model, routing)
    assert changed(before, snapshot(model)) == (set() if mode == "off" else GATES)
    twin, _ = frozen(mode, weights=True)
    if mode == "off":
        assert steps[0].gate_grad_norm is None
    else:
        assert all(step.gate_grad_norm > 0 for step in steps)
    if mode in ("joint", "off"):
        assert_close(steps[0].loss, loss_on(*batch())(twin).detach())
    assert all(step.loss.isfinite() for step in steps)


@pytest.mark.fault("core A16")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_weights_learn_while_all_gates_are_frozen(mode, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, routing = frozen(mode, gates=True, clip=10.0, gate_clip=10.0, scaler=scaler)
    before = snapshot(model)
    steps = train(model, routing)
    assert changed(before, snapshot(model)) == WEIGHTS
    assert all(step.grad_norm > 0 for step in steps)
    if mode != "reference":  # which adds the gradients of both passes
        plain, unrouted = frozen("off", gates=True, clip=10.0)
        train(plain, unrouted)
        assert not changed(snapshot(plain), snapshot(model))


@pytest.mark.fault("core A16")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_frozen_model_only_measures_its_loss(mode, scaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    model, routing = frozen(mode, weights=True, gates=True, clip=1.0, scaler=scaler)
    before = snapshot(model)
    step = routing.step(model, loss_on(*batch()))
    assert not changed(before, snapshot(model))
    assert_close(step.loss, loss_on(*batch())(model))
    assert step.grad_norm is None
    assert step.gate_grad_norm is None
