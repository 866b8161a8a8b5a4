import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    CometGate,
    Gate,
    GateMonitor,
    PermutationSearch,
    PermutedGate,
    RoutingOutput,
    SoftmaxGate,
    TopKGate,
    collect_routing,
    routing_gates,
    update_gates,
)


class CountingGate(Gate):
    """Remembers how many positions its updates saw, in a buffer."""

    learns_from_routings = True

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def reset_parameters(self):
        self.seen.zero_()

    def forward(self, x, *, ids=None, padding_mask=None):
        weights = x.softmax(-1)
        return RoutingOutput(weights, aux={"size": weights.sum()})

    def update(self, routings):
        assert not any(r.weights.requires_grad or r.aux["size"].requires_grad for r in routings)
        self.seen += sum(r.weights.shape[0] for r in routings)


@pytest.fixture
def model():
    return nn.ModuleDict({"a": TopKGate(2, 2, k=1), "b": nn.Sequential(SoftmaxGate(2, 3))})


def test_gates_are_found_by_name(model):
    assert dict(routing_gates(model)) == {"a": model["a"], "b.0": model["b"][0]}
    assert [name for name, _ in routing_gates(model["a"])] == ["TopKGate"]


def test_routings_are_gathered_in_order_with_gradients(model):
    x = torch.randn(3, 2)
    with collect_routing(model) as routings:
        first, second = model["a"](x), model["a"](x + 1)
    model["a"](x)
    assert routings == {"a": [first, second], "b.0": []}
    assert routings["a"][0].weights is first.weights
    assert routings["a"][0].probs.requires_grad


def test_hooks_are_removed_after_errors(model):
    with pytest.raises(RuntimeError, match="stop"), collect_routing(model) as routings:
        raise RuntimeError("stop")
    model["a"](torch.randn(3, 2))
    assert routings["a"] == []


def test_checkpointed_forward_is_gathered_once_and_its_losses_have_gradients(model):
    x = torch.randn(3, 2, requires_grad=True)
    with collect_routing(model) as routings:
        y = checkpoint(lambda x: model["a"](x).weights.exp(), x, use_reentrant=False)
        loss = y.sum() + routings["a"][0].logits.square().sum()
        loss.backward()
    assert len(routings["a"]) == 1
    expected = torch.autograd.grad(model["a"](x).logits.square().sum(), model["a"].weight)[0]
    assert_close(model["a"].weight.grad, expected)


def test_update_sees_every_micro_batch_once():
    gate = CountingGate()
    with update_gates(nn.Sequential(gate)):
        for size in (3, 4):
            x = torch.randn(size, 2, requires_grad=True)
            checkpoint(lambda x: gate(x).weights.exp(), x, use_reentrant=False).sum().backward()
            assert gate.seen == 0
    assert gate.seen == 7


def test_a_failed_step_updates_nothing():
    gate = CountingGate()
    with pytest.raises(RuntimeError, match="stop"):
        raise RuntimeError("stop")
    update_gates(gate)
    assert gate.seen == 0


def test_gates_that_do_not_learn_from_routings_are_updated_without():
    gate = SoftmaxGate(2, 3)
    gate(torch.randn(3, 2))
    assert not gate._forward_hooks
    update_gates(gate)
    assert gate.step == 1


def test_a_gate_within_a_gate_is_not_counted_again():
    """A wrapper returns the auxiliary losses of what it wraps: both together would double them."""
    wrapped = PermutedGate(CometGate(4, 3, k=1), search=PermutationSearch(5))
    model = nn.ModuleDict({"layer": wrapped})
    names = [name for name, _ in routing_gates(model)]
    assert len(names) == 2
    with collect_routing(model) as routings, GateMonitor(model) as monitor:
        wrapped(torch.randn(6, 4))
    assert list(routings) == ["layer"]
    assert len(routings["layer"]) == 1
    assert list(monitor.compute()) == ["layer"]
