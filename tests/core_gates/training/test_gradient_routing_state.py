"""What a step of gradient routing leaves as it was: buffers, random numbers, counts."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from core_gates import FeatureSelectionGate, GateMonitor, TopKGate, collect_routing

NET = runpy.run_path(str(Path(__file__).with_name("routed_net.py")))
MODES, Net, build, batch, loss_on, train, snapshot, changed, GATES, WEIGHTS = (
    NET[name]
    for name in (
        "MODES",
        "Net",
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


@pytest.mark.parametrize("mode", ["dual", "reference"])
def test_the_gate_pass_leaves_buffers_and_random_numbers_as_they_were(mode):
    """Without its step the training is that of a plain loop, bit for bit."""

    def make():
        return Net(dropout=0.5, norm=nn.BatchNorm1d)

    model, routing = build(mode, make=make)
    if mode == "reference":  # its first pass adds to the gradient: no loss, no addition
        gate_loss = lambda m: 0 * m(batch()[0]).sum()  # noqa: E731
    else:
        gate_loss = None
        routing.gate_optimizer.param_groups[0]["lr"] = 0.0
    plain = build(make=make)[0]
    optimizer = torch.optim.Adam([p for n, p in plain.named_parameters() if "gate" not in n], 0.01)
    torch.manual_seed(7)
    for t in range(3):
        routing.step(model, loss_on(*batch(t)), gate_loss)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    for t in range(3):
        optimizer.zero_grad()
        loss_on(*batch(t))(plain).backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.norm.num_batches_tracked == 3
    assert not changed(snapshot(plain), snapshot(model))


def test_both_passes_draw_the_same_masks_for_every_micro_batch():
    model, routing = build(make=lambda: Net(dropout=0.5))
    masks = []
    model.drop.register_forward_hook(lambda _m, inputs, out: masks.append((out == 0).clone()))
    routing.step(model, [loss_on(*batch(t)) for t in range(3)])
    assert len(masks) == 6
    for gate_pass, main_pass in zip(masks[:3], masks[3:], strict=True):
        assert torch.equal(gate_pass, main_pass)  # positive gates change no zero
    assert not torch.equal(masks[0], masks[1])


def test_buffers_return_when_the_loss_raises(refuses):
    model, routing = build(make=lambda: Net(norm=nn.BatchNorm1d))
    before, state = snapshot(model), torch.get_rng_state()

    def loss(m):
        m(batch()[0])
        torch.rand(3)
        raise RuntimeError("out of data")

    refuses(RuntimeError, ("out of data", lambda: routing.step(model, loss)))
    assert not changed(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())


def test_unused_gates_keep_their_state():
    class WithSpare(Net):
        def __init__(self):
            super().__init__()
            self.spare_gate = FeatureSelectionGate(3)

    model, routing = build(make=WithSpare)
    before = snapshot(model)
    train(model, routing)
    assert changed(before, snapshot(model)) == GATES | WEIGHTS
    assert model.spare_gate.logits not in routing.gate_optimizer.state
    with pytest.raises(ValueError, match="the gate loss depends on no parameter"):
        routing.step(model, lambda m: m.first.weight.sum())


def test_gradients_do_not_outlive_the_step_for_gates():
    for mode in MODES:
        model, routing = build(mode)
        train(model, routing, 1)
        assert {n for n, p in model.named_parameters() if p.grad is not None} == WEIGHTS


class Routed(Net):
    """A gated net that also routes to experts."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = TopKGate(3, 2, k=1), nn.Linear(3, 4)

    def forward(self, x):
        routing = self.router(x).to_dense()
        outputs = self.experts(x).unflatten(-1, (2, 2))
        return super().forward(x) + (routing.weights.unsqueeze(-1) * outputs).sum(-2)


@pytest.mark.parametrize("mode", MODES)
def test_routing_gates_and_monitors_count_a_batch_once(mode):
    """The gate pass repeats the positions of the main pass: balancing must not see them twice."""
    model, routing = build(mode, make=Routed)
    with collect_routing(model) as routings, GateMonitor(model) as monitor:
        train(model, routing, steps=2)
    assert (len(routings["router"]), monitor.compute()["gate"]["values"]) == (2, 2 * 8)
