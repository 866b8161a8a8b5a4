"""Gradient routing with a gradient scaler and under autocast."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

NET = runpy.run_path(str(Path(__file__).with_name("routed_net.py")))
MODES, build, batch, loss_on, train, snapshot, changed, WEIGHTS = (
    NET[name]
    for name in ("MODES", "build", "batch", "loss_on", "train", "snapshot", "changed", "WEIGHTS")
)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_scale_changes_nothing(mode):
    """Float32, clipping both groups: the clip must see unscaled gradients."""
    results = []
    for exponent in (None, 0, 8, 16):
        scaler = None if exponent is None else torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
        model, routing = build(mode, clip=0.3, gate_clip=0.02, scaler=scaler)
        train(model, routing)
        results.append(snapshot(model))
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_skips_the_step_and_lowers_the_scale_once(mode):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, routing = build(mode, scaler=scaler)
    before = snapshot(model)
    x, target = batch()
    routing.step(model, lambda m: F.mse_loss(m(x), target) * torch.inf)
    assert not changed(before, snapshot(model))
    assert scaler.get_scale() == 2.0**9
    routing.step(model, loss_on(x, target))
    assert scaler.get_scale() == 2.0**9
    assert changed(before, snapshot(model)) >= WEIGHTS


@pytest.mark.parametrize("overflowing", ["gate.logits", "first.weight"])
@pytest.mark.parametrize("mode", ["dual", "reference", "every_k", "joint"])
def test_an_overflow_of_one_group_skips_both(mode, overflowing):
    """Nor does the optimizer of the gates remember the step: the next one is as if none was."""
    found = []
    for disturbed in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model, routing = build(mode, scaler=scaler, clip=0.3, gate_clip=0.02)
        train(model, routing, 2)
        if disturbed:
            before = snapshot(model)
            hook = model.get_parameter(overflowing).register_hook(lambda grad: grad * torch.inf)
            train(model, routing, 1)
            hook.remove()
            assert not changed(before, snapshot(model))
            assert scaler.get_scale() == 2.0**9
        train(model, routing, 1)
        found.append(snapshot(model))
    assert changed(before, found[0]) >= WEIGHTS
    assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_main_pass_sees_the_new_gates_under_an_outer_autocast():
    """Autocast keeps half-precision copies of weights; those of gates are outdated by then."""

    class LinearGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.body = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.gate(x).sigmoid() * self.body(x)

    model, routing = build(make=LinearGate)
    x, _ = batch()
    outputs = []

    def loss(m):
        outputs.append(m(x))
        return outputs[-1].float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing.gate_optimizer.param_groups[0]["lr"] = 1.0
        routing.step(model, loss)
    assert not torch.equal(outputs[0], outputs[1])
