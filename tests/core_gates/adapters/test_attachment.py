from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.adapters import (
    GatedLoraLinear,
    SparseLoraLinear,
    attach_adapters,
    detach_adapters,
    rank_gates,
)
from core_gates.training import ProximalStep

pytestmark = pytest.mark.fault("core F3")
SORA = partial(SparseLoraLinear, rank=4, initialization="ones")


class Block(nn.Module):
    """Two projections, one layer in two places, and attention that reads a weight."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.second(self.first(self.q_proj(x) + self.v_proj(y)).relu())


def block():
    torch.manual_seed(0)
    return Block(), torch.randn(2, 3, 6)


def learn(model, steps=30):
    """Train what is not frozen to double the output."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ProximalStep(optimizer, rank_gates(model), 2e-3)
    x = torch.randn(64, 3, 6)
    target = 2 * model(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return loss


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_attached_learn_and_come_off_with_the_same_bits(merged):
    model, x = block()
    plain = deepcopy(model).requires_grad_(False)
    model.requires_grad_(False)
    adapted = attach_adapters(model, SORA)
    assert set(adapted) == {"q_proj", "v_proj", "first", "second"}
    assert adapted["first"] is adapted["second"] is model.first
    assert torch.equal(model(x), plain(x))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".adapter." in name for name in names)
    untrained = learn(deepcopy(model), steps=1)
    assert learn(model) < 0.9 * untrained
    expected = model.eval()(x)
    assert not torch.allclose(expected, plain(x))
    if merged:
        for layer in {id(layer): layer for layer in adapted.values()}.values():
            layer.merge()
        assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert detach_adapters(model) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    if merged:
        assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    else:
        assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
        assert torch.equal(model(x), plain.eval()(x))


def test_a_pruned_model_is_restored_with_its_ranks(tmp_path):
    model, x = block()
    attach_adapters(model, partial(SparseLoraLinear, rank=4), where=["?_proj"])
    for number, gate in enumerate(rank_gates(model)):
        gate.data[: number + 2] = 0
        nn.init.normal_(list(model.children())[number].adapter.lora_B)
    expected = model(x)
    for layer in (model.q_proj, model.v_proj):
        layer.adapter.prune_()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    restored, _ = block()
    attach_adapters(restored, partial(SparseLoraLinear, rank=4), where=["?_proj"])
    restored.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert [len(gate) for gate in rank_gates(restored)] == [2, 1]
    assert_close(restored(x), expected)


def test_layers_with_adapters_are_passed_over():
    model, _ = block()
    attach_adapters(model, SORA, where=["q_proj"])
    before = model.q_proj
    assert set(attach_adapters(model, SORA)) == {"v_proj", "first", "second"}
    assert model.q_proj is before
    with pytest.raises(ValueError, match="it offers none that a name leads to"):
        attach_adapters(model, SORA)


def test_adapters_follow_the_layer_in_device_and_dtype():
    layer = SparseLoraLinear(nn.Linear(6, 8, device="meta", dtype=torch.bfloat16)).eval()
    assert layer.adapter.lora_A.is_meta
    assert layer.adapter.lora_B.dtype == torch.bfloat16
    exact = SparseLoraLinear(nn.Linear(6, 8, dtype=torch.bfloat16), dtype=torch.float32)
    assert exact.adapter.lora_A.dtype == torch.float32
    model = nn.Sequential(nn.Linear(6, 8)).eval()
    assert not attach_adapters(model)["0"].training


class Stored(nn.Linear):
    """A layer that keeps its weight in eight bits and computes in the dtype of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def quantized(how, bias):
    """A layer of 6 inputs and 8 outputs, and the dtype of its inputs."""
    torch.manual_seed(0)
    if how == "int8, dynamic":  # its weight and bias are methods
        linear = nn.Sequential(nn.Linear(6, 8, bias=bias))
        return torch.ao.quantization.quantize_dynamic(linear, {nn.Linear})[0], torch.float32
    half = torch.bfloat16
    base = Stored(6, 8, bias=bias, dtype=half)
    base.weight = nn.Parameter((8 * base.weight.detach()).to(getattr(torch, how)), False)
    return base, half


@pytest.mark.fault("46 C2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["int8, dynamic", "int8", "float8_e4m3fn", "float8_e5m2"])
def test_quantized_layers_get_adapters_that_learn(how, bias):
    base, dtype = quantized(how, bias)
    model, x = nn.Sequential(base), torch.randn(5, 6, dtype=dtype)
    before, state = model(x), repr(base.state_dict())
    options = {"kinds": (type(base),)}
    gated = attach_adapters(nn.Sequential(base), partial(GatedLoraLinear), **options)["0"]
    layer = attach_adapters(model, SORA, **options)["0"]
    assert_close((model(x), gated(x)), (before, before), rtol=0, atol=0)
    known = dtype if bias and how != "int8, dynamic" else torch.float32  # by the bias, if any
    assert {layer.adapter.lora_A.dtype, layer.adapter.lora_B.dtype} == {known}
    assert layer.adapter.lora_gate.weight.dtype == torch.float32
    optimizer = torch.optim.SGD(layer.adapter.parameters(), lr=1.0)
    model(x).float().square().mean().backward()
    optimizer.step()
    assert layer.adapter.lora_B.any()
    added = layer.adapter(x.to(known)).to(dtype)
    assert_close(model(x), before + added)
    assert model(x).dtype == before.dtype
    with pytest.raises(ValueError, match=r"stores its weight in torch.* merge before the layer"):
        layer.merge()
    assert detach_adapters(model)[0] is base
    assert repr(base.state_dict()) == state


def test_names_without_a_layer_are_refused(refuses):
    model, _ = block()
    refuses(
        ValueError,
        (
            r"no linear layer of Block matches \['k_proj'\]; it offers",
            lambda: attach_adapters(model, SORA, where=["k_proj"]),
        ),
        ("none that a name leads to", lambda: attach_adapters(nn.Linear(6, 8), SORA)),
    )
