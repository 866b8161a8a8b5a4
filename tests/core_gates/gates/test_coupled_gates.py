"""What holds for every gate that compares tokens with each other."""

from copy import deepcopy

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates import (
    BaseLayerGate,
    ExpertChoiceGate,
    MoELayer,
    RoutingOutput,
    SinkhornGate,
    SoftMoEGate,
    StackedExperts,
)
from tests.core_gates.drawn import filled, randn

DIM, EXPERTS = 6, 5
GATES = {
    "base layer": lambda **o: BaseLayerGate(DIM, EXPERTS, bias=True, **o),
    "auctioned base layer": lambda **o: BaseLayerGate(DIM, EXPERTS, exact_up_to=2, **o),
    "expert choice": lambda **o: ExpertChoiceGate(DIM, EXPERTS, bias=True, **o),
    "sinkhorn": lambda **o: SinkhornGate(DIM, EXPERTS, k=2, bias=True, **o),
    "soft moe": lambda **o: SoftMoEGate(DIM, EXPERTS, num_slots=2, **o),
}


@pytest.fixture(params=GATES)
def make(request):
    def build(**options):
        return filled(GATES[request.param](**options))

    return build


def positions(*shape, dtype=torch.float32):
    return randn(*shape, DIM, seed=2, dtype=dtype)


def floats(routing):
    return tuple(t for t in routing if isinstance(t, torch.Tensor) and t.is_floating_point())


def assert_same_routing(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert_close(a, b, **tolerance)


def rows(routing, mask):
    return RoutingOutput(*(None if t is None else t[mask] for t in routing))


@pytest.mark.parametrize("leading", [(7,), (2, 3, 4), (0,), (2, 0)])
def test_shapes(make, leading):
    routing = make()(positions(*leading))
    assert routing.probs.shape == routing.logits.shape == (*leading, EXPERTS)
    assert routing.to_dense().weights.shape == (*leading, EXPERTS)


def test_it_couples_positions_and_says_so(make):
    gate, x = make(), positions(12)
    assert gate.couples_tokens
    full, part = (dense.weights for dense in (gate(x).to_dense(), gate(x[:5]).to_dense()))
    if isinstance(gate, SoftMoEGate):
        full, part = (routing.dispatch for routing in (gate(x), gate(x[:5])))
    assert not torch.allclose(full[:5], part)


def test_positions_are_alike(make):
    gate, x = make(), positions(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_same_routing(gate(x[order]), rows(gate(x), order))


def test_padding_is_as_if_it_were_not_there(make):
    gate, x = make(), positions(9)
    mask = torch.tensor([False, True, False, True] + [False] * 5)
    routing = gate(x.masked_fill(mask.unsqueeze(-1), torch.nan), padding_mask=mask)
    found, expected = rows(routing, ~mask), gate(x[~mask])
    if routing.kept is not None:
        assert torch.equal(routing.kept.any(-1), ~mask)
        found = found._replace(kept=None)
    assert_same_routing(found, expected)
    assert not routing.to_dense().weights[mask].any()
    routing.to_dense().weights.square().sum().backward()
    masked = [p.grad for p in gate.parameters()]
    gate.zero_grad()
    expected.to_dense().weights.square().sum().backward()
    assert_close(masked, [p.grad for p in gate.parameters()])


def test_gradients(make):
    gate, x = make(dtype=torch.float64), positions(4, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*gate.named_parameters(), strict=True)

    def outputs(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return floats(torch.func.functional_call(gate, given, (x,)))

    assert gradcheck(outputs, (x, *parameters))


def test_routing_is_float32_under_autocast_and_in_half_precision(make):
    gate, x = make(), positions(30)
    expected = gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_routing(gate(x), expected, rtol=0, atol=0)
    half = gate.to(torch.bfloat16)
    routing = half(x.bfloat16())
    assert {t.dtype for t in floats(routing)} == {torch.float32}
    assert_same_routing(routing, deepcopy(half).float()(x.bfloat16().float()))


def test_forward_changes_no_state_and_draws_nothing(make):
    gate, x = make(), positions(6)
    before, rng = deepcopy(gate.state_dict()), torch.get_rng_state()
    gate(x).weights.sum().backward()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_close(dict(gate.state_dict()), dict(before), rtol=0, atol=0)


def test_activation_checkpointing_is_exact(make):
    gate, x = make(), positions(6)
    parameters = list(gate.parameters())

    def layer(x):
        return gate(x).weights.exp().sum()

    plain = torch.autograd.grad(layer(x), parameters)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), parameters)
    assert_close(again, plain, rtol=0, atol=0)


def test_compiles_into_one_graph(make):
    gate, x = make(), positions(6)
    mask = torch.tensor([True, False, False, True, False, False])
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    assert_same_routing(compiled(x, padding_mask=mask), gate(x, padding_mask=mask))


@pytest.mark.parametrize("how", ["dense", "loop", "capacity"])
def test_dispatches_agree(make, how):
    torch.manual_seed(0)
    gate, experts, x = make(), StackedExperts(EXPERTS, DIM, 4), positions(2, 6)
    expected, _ = MoELayer(gate, experts)(x)
    y, _ = MoELayer(gate, experts, dispatch=how)(x)
    assert_close(y, expected)
    assert y.std() > 0
