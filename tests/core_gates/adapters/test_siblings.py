"""Layers of one input under one gate of their fused width."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates.adapters import (
    GatedLoraLinear,
    GatedSiblings,
    LoraGate,
    LowRank,
    attach_siblings,
    detach_adapters,
    side_by_side,
)

IN, SIZES, NAMES = 6, (4, 8, 5), ("to_q", "to_k", "to_v")


class Attention(nn.Module):
    """Three layers of one input, called one after the other."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(IN, SIZES[0]), nn.Linear(IN, SIZES[1], bias=False)
        self.to_v = nn.Linear(IN, SIZES[2])

    def forward(self, x):
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)


def part(size, rank, down=None):
    down = torch.randn(rank, IN, dtype=torch.float64) if down is None else down
    return LowRank(down, torch.randn(size, rank, dtype=torch.float64), 0.5)


@pytest.fixture
def fused():
    """A split model, adapters, and the same as one layer."""
    torch.manual_seed(0)
    model = Attention().double()
    weights = [layer.weight for layer in (model.to_q, model.to_k, model.to_v)]
    biases = [model.to_q.bias, torch.zeros(SIZES[1], dtype=torch.float64), model.to_v.bias]
    linear = nn.Linear(IN, sum(SIZES), dtype=torch.float64)
    linear.weight.data, linear.bias.data = torch.cat(weights).data, torch.cat(biases).data
    shared = torch.randn(3, IN, dtype=torch.float64)
    adapters = [
        side_by_side([part(size, 2) for size in SIZES], SIZES),
        side_by_side([part(size, 3, shared) for size in SIZES], SIZES),
        side_by_side([None, part(SIZES[1], 1), None], SIZES),
    ]
    gate = LoraGate(sum(SIZES), dtype=torch.float64)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    return model, adapters, gate, GatedLoraLinear(linear, adapters, gate=deepcopy(gate))


def attach(model, adapters, gate):
    return attach_siblings(model, NAMES, lambda layers: GatedSiblings(layers, adapters, gate=gate))


def test_ranks_add_up_unless_the_first_factor_is_shared(fused):
    assert [adapter.rank for adapter in fused[1]] == [6, 3, 1]


def test_split_layers_are_the_fused_one(fused):
    model, adapters, gate, whole = fused
    attach(model, adapters, gate)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    assert_close(model(x), whole(x))
    assert not torch.allclose(model(x), whole.base(x))
    cotangent = torch.randn(2, 5, sum(SIZES), dtype=torch.float64)
    expected = torch.autograd.grad(whole(x), (x, *whole.gate.parameters()), cotangent)
    found = torch.autograd.grad(model(x), (x, *gate.parameters()), cotangent)
    assert_close(found, expected)


def test_layers_may_be_called_alone_in_any_order_and_again(fused):
    model, adapters, gate, whole = fused
    attach(model, adapters, gate)
    x = torch.randn(5, IN, dtype=torch.float64)
    q, k, v = whole(x).split(SIZES, -1)
    for _ in range(2):
        assert_close((model.to_v(x), model.to_v(x), model.to_q(x)), (v, v, q))
    with torch.no_grad():
        model.to_q(x)
    assert model.to_k(x).requires_grad
    assert_close(model.to_k(x), k)
    other = x + 1
    model.to_q(other)
    other -= 1
    assert_close(model.to_k(other), k)


def test_what_changes_between_two_layers_is_seen(fused):
    model, adapters, gate, whole = fused
    siblings = attach(model, adapters, gate)
    x = torch.randn(5, IN, dtype=torch.float64)
    model.to_q(x)
    siblings.set_strengths([0.0, 2.0, 1.0])
    whole.set_strengths([0.0, 2.0, 1.0])
    assert_close(model.to_k(x), whole(x)[:, SIZES[0] : sum(SIZES[:2])])
    with torch.no_grad():
        gate.bias += 1
        whole.gate.bias += 1
    assert_close(model.to_v(x), whole(x)[:, sum(SIZES[:2]) :])


def test_checkpointing_and_compiling(fused):
    model, adapters, gate, whole = fused
    attach(model, adapters, gate)
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    tensors = (x, *gate.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), tensors)
    again = checkpoint(model, x, use_reentrant=False).square().sum()
    assert_close(torch.autograd.grad(again, tensors), expected, rtol=0, atol=0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), whole(x))
    assert_close(torch.autograd.grad(compiled(x).square().sum(), tensors), expected)


def test_the_model_is_saved_and_loaded_as_without_adapters(fused, tmp_path):
    model, adapters, gate, _ = fused
    plain = deepcopy(model)
    attach(model, adapters, gate)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    other = Attention().double()
    for assign in (False, True):
        torch.manual_seed(1 + assign)
        new = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
        model.load_state_dict(new, assign=assign)
        other.load_state_dict(new)
        assert_close(model.state_dict(), new, rtol=0, atol=0)
        reference = deepcopy(other)
        attach(reference, adapters, gate)
        x = torch.randn(3, IN, dtype=torch.float64)
        assert_close(model(x), reference(x), rtol=0, atol=0)
    detach_adapters(model)
    assert_close(model(x), other(x), rtol=0, atol=0)
    assert [name for name, _ in model.named_modules()] == ["", *NAMES]


def test_they_move_and_copy_with_the_model(fused):
    model, adapters, gate, _ = fused
    attach(model, adapters, gate)
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = model(x)
    copied = deepcopy(model)
    assert_close(copied(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        copied.to_k.base.weight.zero_()
    assert_close(model(x), expected, rtol=0, atol=0)
    assert not torch.allclose(copied(x), expected)
    assert_close(model.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_misfits_are_refused(fused):
    model, adapters, gate, _ = fused
    with pytest.raises(ValueError, match="must be different layers"):
        attach_siblings(model, ["to_q", "to_q"])
    model.wide = nn.Linear(IN + 1, 2)
    with pytest.raises(
        ValueError, match=r"at least two layers of one input, found inputs \[6, 7\]"
    ):
        attach_siblings(model, ["to_q", "wide"])
    attach(model, adapters, gate)
    with pytest.raises(ValueError, match="to_k has adapters already: detach them first"):
        attach_siblings(model, ["to_k", "to_v"])


def test_an_activation_in_place_may_follow(fused):
    """Outputs are tensors like those of a linear layer, not views of what the layers share."""
    model, adapters, gate, _ = fused
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    found = {}
    for inplace in (False, True):
        own = deepcopy(model)
        attach(own, adapters, deepcopy(gate))
        outputs = [nn.functional.relu(getattr(own, name)(x), inplace=inplace) for name in NAMES]
        assert all(output.is_contiguous() for output in outputs)
        found[inplace] = torch.autograd.grad(sum(o.square().sum() for o in outputs), x)[0]
    assert_close(found[True], found[False])
