"""What the figures of ranking rest on: products as they were called, loops of equal results."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparison import load_head
from benchmarks.recsys import home as networks
from benchmarks.recsys import serving
from benchmarks.recsys.home import LoopedHome, alone, products_of
from core_gates import kernels

SMALL = networks.Size(
    10, 4, 12, {"dim": 4, "hidden_dims": (6,), "rank": 2, "tower_dims": (3,)}, 1.0
)


def flops(product):
    return 2 * product.right.shape[-1] * math.prod(product.left.shape)


def test_products_are_recorded_with_their_layouts():
    x, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)

    def call():
        y = torch.addmm(torch.zeros(4), x, weight.mT)
        return torch.autograd.grad(y.sum(), weight)

    forward, backward = products_of(call)
    assert forward.left.shape == (5, 3)
    assert (forward.right.shape, forward.right.strides) == ((3, 4), (1, 3))
    assert flops(forward) == flops(backward) == 2 * 5 * 3 * 4
    by_one_dnn = forward._replace(one_dnn=True)
    made = [forward, backward, by_one_dnn] if torch.backends.mkldnn.is_available() else [forward]
    assert products_of(alone(made)) == made


@pytest.mark.parametrize("work", networks.SHARES)
def test_no_product_of_home_is_missed(work):
    """PyTorch's own counter finds the same work in the forward pass."""
    home = networks.home_of(load_head, SMALL)
    v = torch.randn(SMALL.rows, SMALL.inputs, requires_grad=True)

    def call():
        out = home(v).sum()
        if work == networks.TRAINING:
            out.backward()

    with FlopCounterMode(display=False) as counter:
        call()
    found, counted = sum(map(flops, products_of(call))), counter.get_total_flops()
    if work == networks.FORWARD:
        assert found == counted > 0
    else:  # the counter knows no addmm_, where gradients are added in place
        assert counted < found < 3.5 * sum(map(flops, products_of(lambda: home(v))))


@pytest.mark.parametrize("mode", ["reference", "cpp"])
def test_the_loop_has_the_same_results(mode):
    home = networks.home_of(load_head, SMALL)
    loop = LoopedHome(home)
    number = sum(p.numel() for p in home.parameters())
    assert sum(p.numel() for p in loop.parameters()) == number
    v = torch.randn(SMALL.rows, SMALL.inputs, requires_grad=True)
    for network in (home, loop):
        network.eval()
    with kernels(mode):
        assert_close(home(v), loop(v), rtol=1e-4, atol=1e-5)
        results = [networks_slope(network.train(), v) for network in (home, loop)]
    assert_close(*results, rtol=1e-3, atol=1e-4)


def networks_slope(network: nn.Module, v: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, SMALL.tasks)
    return torch.autograd.grad((network(v).sigmoid() * weights).sum(), v)[0]


def test_a_report_is_made_in_one_step_of_a_hundred(monkeypatch):
    monkeypatch.setitem(serving.SIZES, "small", SMALL)
    monkeypatch.setitem(serving.SINGLE_CALLS, "small", 1)
    comparison = serving.reported("small")
    assert comparison.mixtures["ExpertReport"] == {"step passed over": 0.99, "step reported": 0.01}
    calls = comparison.build(load_head)
    first = calls["step reported"]()
    assert [layer.name for layer in first.layers] == ["layer 1", "layer 2"]
    assert calls["step passed over"]() is first
    assert calls["step reported"]() is not first
