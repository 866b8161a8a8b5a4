"""The layer and its ops on CUDA against the CPU; on the CPU the tests compare it with itself."""

import copy

import pytest
import torch

from core_gates import MoELayer, StackedExperts, TopKGate
from core_gates.moe.dispatch import DISPATCHES
from core_gates.ops import grouped_linear
from core_gates.ops.grouped_linear import grouped_mm, reference

TOKENS, DIM, HIDDEN, EXPERTS = 64, 16, 32, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the norm


def assert_near(found, expected, error):
    for name, value in expected.items():
        difference = (found[name].cpu().double() - value.double()).norm()
        assert difference <= error * value.double().norm(), name


def results(layer, x):
    x = x.clone().requires_grad_()
    y, routing = layer(x, padding_mask=torch.arange(TOKENS, device=x.device) % 9 == 0)
    (y * torch.linspace(-1, 1, DIM, device=x.device)).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "indices": routing.indices, "x": x.grad} | gradients


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_layer_on_the_device(device, dispatch, dtype):
    torch.manual_seed(0)
    experts = StackedExperts(EXPERTS, DIM, HIDDEN, bias=True)
    layer = MoELayer(TopKGate(DIM, EXPERTS, k=2), experts, dispatch=dispatch).to(dtype)
    torch.nn.init.normal_(layer.gate.weight)
    x = torch.randn(TOKENS, DIM).to(dtype)
    found = results(copy.deepcopy(layer).to(device), x.to(device))
    expected = results(layer, x)
    assert torch.equal(found.pop("indices").cpu(), expected.pop("indices"))
    assert expected["gate.weight"].any()
    assert_near(found, expected, ERRORS[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_linear_in_bfloat16_on_the_device(device):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([20, 0, 9, 3])  # one expert without rows, eight rows without expert
    x, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        for shape in ((40, DIM), (EXPERTS, 2 * HIDDEN, DIM), (EXPERTS, 2 * HIDDEN))
    )
    order = torch.randperm(40, generator=generator)
    mine = [t.detach().to(device).requires_grad_() for t in (x, weight, bias)]
    there = [t.to(device) for t in (counts, order)]
    if device == "cuda":
        assert grouped_mm.possible(mine[0], mine[1])
    y = grouped_linear(
        *mine[:2], there[0], bias=mine[2], activation="silu", gated=True, gather=there[1]
    )
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference.forward(*exact[:2], counts, exact[2], order, None, "silu", True)
    assert not y[32:].any()
    results = []
    for out, leaves in ((y, mine), (expected, exact)):
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append({"y": out.detach(), "x": grads[0], "weight": grads[1], "bias": grads[2]})
    assert not results[0]["weight"][1].any()
    assert_near(*results, ERRORS[torch.bfloat16])
