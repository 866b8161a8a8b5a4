"""A gate that opens retrieved adapters: its start, its symmetry, its strengths, its layers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.adapters import GatedLoraLinear, LowRank, OpenGate, RelevanceGate
from core_gates.adapters.relevance import features


def drawn(count, samples=5, seed=0):
    """Cosines (samples, count) and similarities (count, count) of unit vectors."""
    draw = torch.Generator().manual_seed(seed)
    vectors = nn.functional.normalize(torch.randn(count, 12, generator=draw).double(), dim=-1)
    text = nn.functional.normalize(torch.randn(samples, 12, generator=draw).double(), dim=-1)
    return text @ vectors.T, vectors @ vectors.T


def trained(**options):
    torch.manual_seed(1)
    gate = RelevanceGate(**options).double()
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=0.3)
    return gate


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("less", [0.0, 0.4])
def test_it_starts_as_its_rule_for_one_to_eight_adapters(count, less):
    gate = RelevanceGate(0.17, 0.03, less).double()
    cosines, similarities = drawn(count)
    rest = cosines.clone()
    for row, values in enumerate(cosines.tolist()):
        for k, own in enumerate(values):
            higher = [similarities[k, j].item() for j, one in enumerate(values) if one > own]
            rest[row, k] -= less * max([0.0, *higher])
    expected = torch.sigmoid((rest - 0.17) / 0.03)
    assert_close(gate.openness(cosines, similarities), expected, rtol=1e-6, atol=1e-6)
    moved = trained().openness(cosines, similarities)
    assert ((moved > 0) & (moved < 1)).all()
    assert (moved - expected).abs().max() > 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_the_order_of_adapters_changes_nothing_even_where_cosines_are_equal(tied):
    gate, (cosines, similarities) = trained(), drawn(6)
    if tied:
        cosines[:, 3] = cosines[:, 1]
    order = torch.tensor([4, 1, 5, 3, 0, 2])
    swapped = gate.openness(cosines[:, order], similarities[order][:, order])
    assert_close(swapped, gate.openness(cosines, similarities)[:, order])


def test_features_are_those_that_are_named():
    similarities = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, -0.3], [0.2, -0.3, 1.0]])
    found = features(torch.tensor([0.2, 0.5, 0.4]), similarities)
    expected = [
        [
            8 * -0.05,
            8 * 0.2,
            0.0,
            2 / 8,
            0.4,
            0.5,
        ],  # two higher; the closer one of them is the first
        [8 * 0.25, 0.0, 8 * 0.1, 0.0, 1.0, 0.0],
        [8 * 0.15, 8 * 0.1, 8 * 0.2, 1 / 8, 0.8, -0.3],
    ]
    assert_close(found, torch.tensor(expected))


def test_every_parameter_learns_after_the_first_step():
    gate, given = RelevanceGate(0.1, 0.2).double(), drawn(4)
    gate.openness(*given).square().sum().backward()
    assert gate.outer.weight.grad.abs().min() > 0
    assert not gate.inner.weight.grad.any()  # the network is zero until its output has moved
    gate = trained(width=0.5)
    parameters = tuple(gate.parameters())

    def opened(*values):
        return torch.func.functional_call(
            gate, dict(zip(dict(gate.named_parameters()), values, strict=True)), given
        )

    gate.forward = gate.openness
    assert torch.autograd.gradcheck(opened, parameters)


@pytest.mark.parametrize(
    ("count", "strength"), [(2, 0.9), (3, 0.7), (2.5, 0.8), (8, 0.5), (0, 1.1)]
)
def test_strengths_follow_the_expected_number_of_open_adapters(count, strength):
    gate, factors = RelevanceGate(), torch.tensor([[0.9], [0.7]])
    openness = torch.full((8,), count / 8)
    gate.set_openness(openness)
    assert_close(gate.weights(factors), torch.tensor([strength]))
    assert_close(gate(factors), openness * strength)
    gate.set_openness(None)
    assert gate(factors) == 1.0


def adapters(ranks=(2, 3, 2), magnitude=False):
    torch.manual_seed(4)
    return [
        LowRank(torch.randn(r, 5), torch.randn(7, r), 0.5, torch.rand(7) + 1 if magnitude else None)
        for r in ranks
    ]


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (2, 3, 2), (2, 0, 3)])
def test_a_layer_multiplies_before_the_second_factor_sample_by_sample(ranks, shape):
    gate, base = RelevanceGate(), nn.Linear(5, 7)
    layer = GatedLoraLinear(base, given := adapters(ranks), gate=OpenGate(7, kinds=1))
    with torch.no_grad():
        layer.gate.factors.copy_(torch.tensor([[0.9], [0.6]]))
    layer.context = gate
    layer.set_strengths([1.0, 0.5, 2.0])
    opened = torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    gate.set_openness(opened)
    x = torch.randn(shape)
    strength = 0.9 - 0.3 * (opened.sum(1).clamp(1, 4) - 2)
    for sample in range(4):
        expected = base(x[sample])
        for k, adapter in enumerate(given):
            weight = opened[sample, k] * strength[sample] * (1.0, 0.5, 2.0)[k]
            expected = expected + 0.5 * weight * (x[sample] @ adapter.down.T @ adapter.up.T)
        assert_close(layer(x)[sample], expected)
    gate.set_openness(opened[0])
    assert_close(layer(x)[0], layer(x[:1])[0])
    closed = layer.gate_values(x)
    on = [k for k, rank in enumerate(ranks) if rank]
    assert_close(closed[..., 0], opened[0, on].expand(*shape[:-1], len(on)))


def test_adapters_with_magnitudes_are_opened_too():
    gate, base = RelevanceGate(), nn.Linear(5, 7)
    layer = GatedLoraLinear(base, adapters(magnitude=True), gate=OpenGate(7, kinds=1))
    layer.context, x = gate, torch.randn(2, 4, 5)
    whole = layer(x) - base(x)
    gate.set_openness(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert_close(layer(x), torch.stack([base(x[0]) + whole[0], base(x[1])]), rtol=1e-5, atol=1e-5)


def test_gradients_reach_gate_and_strengths_through_a_layer():
    gate, (cosines, similarities) = trained(width=0.3).float(), drawn(3, samples=4)
    layer = GatedLoraLinear(nn.Linear(5, 7), adapters(), gate=OpenGate(7, kinds=1))
    layer.context = gate
    gate.set_openness(gate.openness(cosines, similarities))
    layer(torch.randn(4, 2, 5)).square().sum().backward()
    for parameter in (*gate.parameters(), layer.gate.factors):
        assert parameter.grad.abs().sum() > 0


def test_it_keeps_what_embeds_adapters_and_refuses_what_does_not_fit(refuses):
    gate, loaded = RelevanceGate(fingerprint="00ff12a4b3c5d6e7"), RelevanceGate()
    assert loaded.fingerprint == ""
    rounded = {name: value.bfloat16() for name, value in gate.state_dict().items()}
    loaded.load_state_dict(rounded)
    assert loaded.fingerprint == "00ff12a4b3c5d6e7"
    refuses(
        ValueError,
        ("expected 1 to 8 adapters", lambda: gate.openness(*drawn(9))),
        ("expected 1 to 8 adapters", lambda: gate.openness(torch.ones(2, 0), torch.ones(0, 0))),
        (r"similarities \(2, 2\)", lambda: gate.openness(torch.ones(2, 3), torch.ones(2, 2))),
        ("width is 0", lambda: RelevanceGate(width=0.0)),
        ("expected 16 hexadecimal digits", lambda: RelevanceGate(fingerprint="ab")),
    )
