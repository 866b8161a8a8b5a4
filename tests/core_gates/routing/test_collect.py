import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from core_gates import (
    CometGate,
    DenseToSparseGate,
    Gate,
    GateMonitor,
    PermutedGate,
    ReMoEGate,
    RoutingOutput,
    SigmoidGate,
    SoftmaxGate,
    TemperatureSchedule,
    TopKGate,
    collect_routing,
    update_gates,
)
from core_gates.routing import PermutationSearch, routing_gates


class Reads(TorchDispatchMode):
    """Counts how often a single number is read on the host."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class CountingGate(Gate):
    """Remembers how many tokens its updates saw, in a buffer."""

    def __init__(self):
        super().__init__(2, 2, summary_size=1)
        self.register_buffer("seen", torch.zeros(()))

    def reset_parameters(self):
        self.seen.zero_()

    def forward(self, x, *, ids=None, padding_mask=None):
        return RoutingOutput(x.softmax(-1))

    def summary(self, routing):
        return torch.tensor([len(routing.weights)])

    def update(self, summary=None, step=None):
        self.seen += summary[0]


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


def test_nothing_is_gathered_after_errors(model):
    with pytest.raises(RuntimeError, match="stop"), collect_routing(model) as routings:
        raise RuntimeError("stop")
    model["a"](torch.randn(3, 2))
    assert routings["a"] == []


def test_blocks_may_be_nested(model):
    with collect_routing(model) as outer:
        with collect_routing(model["a"]) as inner:
            first = model["a"](torch.randn(3, 2))
        second = model["a"](torch.randn(3, 2))
    assert (inner["TopKGate"], outer["a"]) == ([first], [first, second])


def test_checkpointed_forward_is_gathered_once_and_its_losses_have_gradients(model):
    x = torch.randn(3, 2, requires_grad=True)
    with collect_routing(model) as routings:
        y = checkpoint(lambda x: model["a"](x).weights.exp(), x, use_reentrant=False)
        (y.sum() + routings["a"][0].logits.square().sum()).backward()
    assert len(routings["a"]) == 1
    expected = torch.autograd.grad(model["a"](x).logits.square().sum(), model["a"].weight)[0]
    assert_close(model["a"].weight.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_update_sees_every_micro_batch_once(use_reentrant):
    gate = CountingGate()
    for size in (3, 4):
        x = torch.randn(size, 2, requires_grad=True)
        checkpoint(lambda x: gate(x).weights.exp(), x, use_reentrant=use_reentrant).sum().backward()
        assert gate.seen == 0
    update_gates(nn.Sequential(gate))
    assert gate.seen == 7
    gate(torch.randn(5, 2))
    update_gates(gate)
    assert gate.seen == 12  # what was counted is cleared


@pytest.mark.fault("core A1")
def test_a_learning_gate_that_saw_nothing_is_named():
    model = nn.ModuleDict({"a": CountingGate(), "b": CountingGate(), "c": SoftmaxGate(2, 3)})
    model.eval()["a"](torch.randn(3, 2))  # evaluation is not counted
    model.train()["b"](torch.randn(3, 2))
    with pytest.raises(ValueError, match="gate 'a' learns from its routings, but saw none since"):
        update_gates(model)
    assert (model["b"].seen, model["c"].step) == (0, 0)
    model["a"](torch.randn(2, 2))
    update_gates(model)
    assert (model["a"].seen, model["b"].seen, model["c"].step) == (2, 3, 1)


def test_what_a_step_has_counted_is_no_state():
    gate = CountingGate()
    gate(torch.randn(3, 2))
    assert list(gate.state_dict()) == ["seen"]
    assert [name for name, _ in gate.named_buffers()] == ["seen"]
    copied = deepcopy(gate)
    copied(torch.randn(1, 2))
    assert (gate.counted.tolist(), copied.counted.tolist()) == ([1, 3], [2, 4])
    assert gate.to("meta").to_empty(device="cpu").counted.tolist() == [0, 0]


def test_transforms_and_exports_count_nothing():
    """Neither may change a tensor from outside."""
    gate = ReMoEGate(4, 8)
    x = torch.randn(5, 4)
    gradient = torch.func.grad(lambda x: gate(x).weights.square().sum())(x)
    torch.vmap(lambda x: gate(x).weights)(x)
    assert "accumulate" not in str(torch.export.export(gate, (x,)).graph)
    assert gradient.abs().max() > 0
    assert not gate.counted.any()


@pytest.mark.fault("core A2")
def test_no_tensor_of_a_micro_batch_is_kept():
    gate = SigmoidGate(4, 8, k=2, balance_rate=0.1)
    alive = []
    for _ in range(3):
        routing = gate(torch.randn(64, 4))
        alive += [weakref.ref(t) for t in (routing.weights, routing.indices, routing.logits)]
        del routing
    assert not any(reference() is not None for reference in alive)
    assert gate.counted.tolist()[0] == 3
    still = SigmoidGate(4, 8, k=2)  # without balancing there is nothing to learn
    still(torch.randn(64, 4))
    assert not still.counted.any()


@pytest.mark.fault("core A12")
def test_an_update_reads_the_device_once(monkeypatch):
    """Plain numbers come from one read: of calls and steps of all gates together."""
    gates = nn.ModuleList(
        [SigmoidGate(4, 8, k=2, balance_rate=0.1) for _ in range(3)]
        + [SoftmaxGate(4, 8, tau=TemperatureSchedule(2.0, 1.0, 9)) for _ in range(3)]
        + [DenseToSparseGate(4, 8) for _ in range(3)]
        + [PermutedGate(TopKGate(4, 8), search=PermutationSearch(9)) for _ in range(3)]
    )
    for gate in gates:
        gate(torch.randn(5, 4))
    lists = []
    with monkeypatch.context() as patch, Reads() as reads:
        patch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t) or t.numpy().tolist())
        update_gates(gates)
    assert (reads.number, len(lists), [int(gate.step) for gate in gates[3:]]) == (0, 1, [1] * 9)


def test_a_gate_within_a_gate_is_not_counted_again():
    """A wrapper returns the auxiliary losses of what it wraps: both together would double them."""
    wrapped = PermutedGate(CometGate(4, 3, k=1), search=PermutationSearch(5))
    model = nn.ModuleDict({"layer": wrapped})
    assert len([name for name, _ in routing_gates(model)]) == 2
    with collect_routing(model) as routings, GateMonitor(model) as monitor:
        wrapped(torch.randn(6, 4))
    assert (list(routings), len(routings["layer"])) == (["layer"], 1)
    assert list(monitor.compute()) == ["layer"]
