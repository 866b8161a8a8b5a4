"""Adapters that are exchanged, weighted, moved, or change a weight by its rows."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from core_gates.adapters import (
    GatedLoraLinear,
    LoraGate,
    LowRank,
    OpenGate,
    Room,
    attach_adapters,
    detach_adapters,
)

IN, OUT = 6, 8


def adapters(*ranks, seed=0, magnitude=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        LowRank(draw(r, IN), draw(OUT, r), 0.5 + k, draw(OUT).abs() if magnitude else None)
        for k, r in enumerate(ranks)
    ]


def layer_of(given, *, gate=None, **options):
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = GatedLoraLinear(base, given, gate=gate, dtype=torch.float64, **options)
    for parameter in layer.gate.parameters():
        nn.init.normal_(parameter)
    return layer


def tokens(*leading):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*leading, IN, generator=generator, dtype=torch.float64)


def test_strengths_are_those_of_the_scales():
    given, x = adapters(2, 0, 3), tokens(5)
    layer = layer_of(given)
    before = [layer.down.data_ptr(), layer.up.data_ptr()]
    layer.set_strengths([0.3, 7.0, -1.5])
    assert [layer.down.data_ptr(), layer.up.data_ptr()] == before
    scaled = [a._replace(scale=s * a.scale) for a, s in zip(given, [0.3, 7, -1.5], strict=True)]
    assert_close(layer(x), layer_of(scaled)(x))
    layer.set_strengths([0, 1, 1])
    assert_close(layer(x), layer_of(given[2:])(x))
    assert_close(layer.gate_values(x)[:, 1], layer_of(given[2:]).gate_values(x)[:, 0])


@pytest.mark.parametrize("given", [[1.0], [1.0, float("nan"), 1.0], []])
def test_wrong_strengths_are_refused(given):
    with pytest.raises(ValueError, match="must be finite numbers, one for each adapter"):
        layer_of(adapters(2, 0, 3)).set_strengths(given)


def test_a_checkpoint_holds_the_strengths_and_old_ones_have_none():
    layer, x = layer_of(adapters(2, 3)), tokens(5)
    plain = layer(x)
    layer.set_strengths([2.0, 0.5])
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    restored = layer_of(adapters(1))
    restored.load_state_dict(state)
    assert_close(restored(x), layer(x), rtol=0, atol=0)
    del state["strengths"]
    restored.load_state_dict(state)
    assert_close(restored(x), plain, rtol=0, atol=0)


def test_an_exchange_within_the_room_compiles_nothing_again():
    room, x = Room(3, 4), tokens(5)
    layer = layer_of(adapters(2, 4), room=room)
    assert_close(layer(x), layer_of(adapters(2, 4))(x))
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counted, fullgraph=True)
    compiled(x)
    place = layer.down.data_ptr()
    for ranks in ((1, 3, 4), (4,), ()):
        layer.set_adapters(adapters(*ranks, seed=2))
        found = compiled(x)
        assert_close(found, layer_of(adapters(*ranks, seed=2))(x))
        if ranks:
            layer.set_strengths([0.5] * len(ranks))
            assert not torch.allclose(compiled(x), found)
    assert counted.frame_count == 1
    assert layer.down.data_ptr() == place
    with pytest.raises(ValueError, match=r"room for 3 adapters of rank 4, found 1 of ranks \[5\]"):
        layer.set_adapters(adapters(5))


def test_an_open_gate_is_the_sum():
    given, x = adapters(2, 3), tokens(2, 5)
    layer = layer_of(given, gate=OpenGate(OUT))
    delta = sum(adapter.delta_weight() for adapter in given)
    assert_close(layer(x), layer.base(x) + x @ delta.mT)
    assert not list(layer.gate.parameters())
    assert torch.equal(layer.gate_values(x), torch.ones(2, 5, 2, OUT, dtype=torch.float64))


class Coded(nn.Module):
    """A layer with eight-bit weights."""

    in_features, out_features = IN, OUT

    def __init__(self, linear):
        super().__init__()
        self.step = linear.weight.abs().max().item() / 127
        self.register_buffer("codes", (linear.weight / self.step).round().to(torch.int8))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.step).mT + self.bias


@pytest.mark.parametrize("kind", ["linear", "coded"])
def test_magnitudes_are_the_norms_of_the_rows(kind):
    """DoRA: W' = m (W + s B A) / |W + s B A|, row by row."""
    given, x = adapters(2, magnitude=True), tokens(2, 5)
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    weight = base.weight.detach()
    if kind == "coded":
        base = Coded(base)
        weight = base.codes.double() * base.step
    layer = GatedLoraLinear(base, given, gate=OpenGate(OUT))
    changed = weight + given[0].scale * given[0].up @ given[0].down
    changed = given[0].magnitude.unsqueeze(-1) * changed / changed.norm(dim=1, keepdim=True)
    assert_close(layer(x), x @ changed.mT + base.bias, rtol=1e-6, atol=1e-6)
    assert_close(given[0].delta_weight(weight), changed - weight)
    layer.set_strengths([0.25])
    assert_close(layer(x), base(x) + 0.25 * x @ (changed - weight).mT, rtol=1e-6, atol=1e-6)


def test_magnitudes_under_a_gate_beside_plain_adapters():
    given, x = [*adapters(2, magnitude=True), *adapters(3, seed=4)], tokens(5).requires_grad_()
    layer = layer_of(given)
    loras = [x @ a.delta_weight(layer.base.weight.detach()).mT for a in given]
    expected = layer.gate(layer.base(x), torch.stack(loras, -2))
    assert_close(layer(x), expected)
    assert_close(layer.adapter_outputs(x), torch.stack(loras, -2))
    restored = layer_of(())
    restored.load_state_dict(layer.state_dict())
    assert_close(restored(x), expected)
    layer.set_adapters(given[1:])
    assert layer.base_gains is None
    with pytest.raises(ValueError, match="changes a weight by its rows"):
        given[0].delta_weight()
    with pytest.raises(ValueError, match=r"magnitude \(7,\) does not fit a layer of 8 outputs"):
        layer.set_adapters([given[0]._replace(magnitude=torch.ones(7))])


def test_a_layer_without_memory_keeps_its_adapters():
    given, x = adapters(2, 3), tokens(5)
    with torch.device("meta"):
        base = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = GatedLoraLinear(base, given, dtype=torch.float64)
    layer.to_empty(device="cpu")
    other = layer_of(given)
    for part in ("base", "gate"):
        getattr(layer, part).load_state_dict(getattr(other, part).state_dict())
    assert layer.ranks == [2, 3]
    assert_close(layer(x), other(x), rtol=0, atol=0)
    assert_close(layer.to("meta").up, other.up, rtol=0, atol=0)
    assert layer.float().up.dtype == torch.float32


def test_a_second_layer_of_adapters_is_refused():
    layer = layer_of(adapters(2))
    with pytest.raises(ValueError, match="has adapters already: exchange them by set_adapters"):
        GatedLoraLinear(layer, adapters(2))


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN, bias=False)).double()


@pytest.mark.parametrize("assign", [False, True])
def test_a_transparent_model_is_saved_and_loaded_as_without_adapters(assign):
    model, plain = model_of(), model_of()
    adapt = partial(GatedLoraLinear, adapters=adapters(2))
    attach_adapters(model, adapt, where=["0"], transparent=True)
    x = tokens(3)
    assert not torch.allclose(model(x), plain(x))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    new = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    model.load_state_dict(new, assign=assign)
    plain.load_state_dict(new)
    reference = deepcopy(plain)
    attach_adapters(reference, adapt, where=["0"])
    assert_close(model(x), reference(x), rtol=0, atol=0)
    assert_close(detach_adapters(model)(x), plain(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        reference.load_state_dict({**new, "0.base.other": torch.ones(1)})


def test_the_gate_is_no_part_of_what_a_transparent_model_loads():
    model = model_of()
    gate = LoraGate(OUT, dtype=torch.float64)
    nn.init.normal_(gate.bias)
    kept = gate.bias.detach().clone()
    adapt = partial(GatedLoraLinear, adapters=adapters(2), gate=gate)
    attach_adapters(model, adapt, where=["0"], transparent=True)
    model.load_state_dict(model_of().state_dict())
    assert torch.equal(gate.bias, kept)
    assert model[0].ranks == [2]


def test_small_changes_add_up_beside_a_large_output_in_half_precision():
    """Eight DoRAs that add a half each to 256, between whose neighbors in bfloat16 lies 2."""
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    nn.init.constant_(base.weight, 256 / IN)
    nn.init.zeros_(base.bias)
    norm = base.weight.detach().float().norm(dim=1)
    nothing = torch.zeros(1, IN), torch.zeros(OUT, 1)
    one = LowRank(*nothing, magnitude=norm * (1 + 0.5 / 256))
    layer = GatedLoraLinear(base, [one] * 8, gate=OpenGate(OUT))
    x = torch.ones(2, IN, dtype=torch.bfloat16)
    assert_close(base(x), torch.full((2, OUT), 256.0, dtype=torch.bfloat16))
    assert_close(layer(x), torch.full((2, OUT), 260.0, dtype=torch.bfloat16), rtol=0, atol=0)
