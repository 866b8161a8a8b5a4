"""Layers and the sum over choices inside ``torch.func`` transforms, export and tracing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close

from core_gates import GatesError, MoELayer, StackedExperts, SwitchGate, TopKGate
from core_gates.moe.dispatch import DISPATCHES, combine

EXPERTS, DIM = 4, 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func.jvp
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap of scatter_
]


def layer_of(dispatch="sorted", gate=TopKGate):
    torch.manual_seed(0)
    made = gate(DIM, EXPERTS)
    nn.init.normal_(made.weight)
    return MoELayer(made, StackedExperts(EXPERTS, DIM, 5), dispatch=dispatch, return_routing=False)


def tokens(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


def choices():
    """Rows (N, D), weights (T, K), place (T, K) and order (N,) of 5 tokens with 2 choices each."""
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(10, 3, generator=generator), torch.rand(5, 2, generator=generator)
    place = torch.randperm(10, generator=generator).view(5, 2)
    return rows, weights, place, place.flatten().argsort()


def formula(rows, weights, place):
    return (rows[place] * weights.unsqueeze(-1)).sum(-2)


@pytest.mark.fault("core A7")
@pytest.mark.parametrize("ordered", [True, False])
def test_combine_is_transformed_like_its_formula(ordered):
    rows, weights, place, order = choices()

    def found(rows, weights):
        return combine(rows, weights, place, order if ordered else None)

    def expected(rows, weights):
        return formula(rows, weights, place)

    def loss_of(function):
        return lambda rows, weights: function(rows, weights).square().sum()

    for transform in (
        lambda f: grad(loss_of(f), (0, 1))(rows, weights),
        lambda f: hessian(loss_of(f))(rows, weights),
        lambda f: jvp(f, (rows, weights), (rows + 1, weights - 1)),
        lambda f: vmap(f, (0, None))(torch.stack([rows, 2 * rows]), weights),
        lambda f: vmap(grad(loss_of(f), 1), (None, 0))(rows, torch.stack([weights, -weights])),
    ):
        assert_close(transform(found), transform(expected))


@pytest.mark.fault("core A7")
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_layer_is_transformed_like_a_plain_function(dispatch):
    layer, x = layer_of(dispatch), tokens(3, 5)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    layer(x[0]).square().sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    assert_close(grad(loss)(parameters, x[0]), expected)
    each = vmap(grad(loss), (None, 0))(parameters, x)  # the gradient of every sample
    assert_close({name: g[0] for name, g in each.items()}, expected)

    tangent = tokens(5) - 1
    y, moved = jvp(layer, (x[0],), (tangent,))
    assert_close(y, layer(x[0]))
    assert_close(moved, torch.einsum("tdsf,sf->td", jacrev(layer)(x[0]), tangent))
    step = 1e-3
    slope = (layer(x[0] + step * tangent) - layer(x[0] - step * tangent)) / (2 * step)
    assert_close(moved, slope, rtol=0.02, atol=2e-3)


@pytest.mark.fault("core F6")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("gate", [TopKGate, SwitchGate])
def test_tracing_is_refused(gate):
    layer = layer_of(gate=gate).eval()
    with pytest.raises(GatesError, match="of this one input in MoELayer: use"):
        torch.jit.trace(layer, tokens(5))
