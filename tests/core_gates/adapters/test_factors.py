"""Adapters that are exchanged, weighted, moved, or change a weight by its rows."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.adapters import (
    AdapterCapacity,
    GatedLoraLinear,
    GatedSiblings,
    LoraGate,
    LowRank,
    OpenGate,
    attach_adapters,
    detach_adapters,
    side_by_side,
)
from tests.core_gates.drawn import filled, randn

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
    filled(layer.gate)
    return layer


def tokens(*leading):
    return randn(*leading, IN, seed=1)


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
    capacity, x = AdapterCapacity(3, 4), tokens(5)
    layer = layer_of(adapters(2, 4), capacity=capacity)
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
    assert (counted.frame_count, layer.down.data_ptr()) == (1, place)
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


class Wrapped(nn.Module):
    """A layer in another module, with dropout of its inputs."""

    in_features, out_features = IN, OUT

    def __init__(self, linear):
        super().__init__()
        self.inner, self.dropout = linear, nn.Dropout(0.5)

    def forward(self, x):
        return self.inner(self.dropout(x))


class OffsetLinear(nn.Linear):
    """A linear layer whose bias has another name."""

    def __init__(self, linear):
        super().__init__(IN, OUT, bias=False, dtype=torch.float64)
        self.weight = linear.weight
        self.offset = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return super().forward(x) + self.offset


class OfBuffers(nn.Module):
    """A frozen layer without parameters."""

    in_features, out_features = IN, OUT

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("matrix", linear.weight.detach().clone())
        self.register_buffer("shift", linear.bias.detach().clone())

    def forward(self, x):
        return x @ self.matrix.mT + self.shift


def hooked(linear):
    linear.register_forward_hook(lambda module, inputs, output: 2 * output + 1)
    return linear


def replaced(linear):
    linear.forward = lambda x: F.linear(x, 2 * linear.weight, linear.bias)
    return linear


BASES = {
    "linear": lambda linear: linear,
    "with another forward": replaced,
    "without bias": lambda linear: nn.Linear(IN, OUT, bias=False, dtype=torch.float64),
    "coded": Coded,
    "wrapped": Wrapped,
    "wrapped twice": lambda linear: Wrapped(OffsetLinear(linear)),
    "bias of another name": OffsetLinear,
    "buffers": OfBuffers,
    "hooked": hooked,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


def dense(base):
    """Return the weight and the bias that a layer computes with."""
    unit, was = torch.eye(IN, dtype=torch.float64), base.training
    bias = base.eval()(torch.zeros(1, IN, dtype=torch.float64)).detach()
    weight = (base(unit) - bias).mT.detach()
    base.train(was)
    return weight, bias


@pytest.mark.fault("bias of DoRA")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_magnitudes_are_the_norms_of_the_rows(kind, training):
    """DoRA: W' = m (W + s B A) / |W + s B A|, row by row, whatever kind of layer W is in."""
    given, x = adapters(2, magnitude=True), tokens(2, 5)
    base = BASES[kind](nn.Linear(IN, OUT, dtype=torch.float64)).train(training)
    weight, bias = dense(base)
    layer = GatedLoraLinear(base, given, gate=OpenGate(OUT))
    assert base.training is training
    base.eval()
    changed = weight + given[0].scale * given[0].up @ given[0].down
    changed = given[0].magnitude.unsqueeze(-1) * changed / changed.norm(dim=1, keepdim=True)
    assert_close(layer(x), x @ changed.mT + bias)
    assert_close(layer(x[0, 0]), x[0, 0] @ changed.mT + bias[0])
    assert_close(layer.adapter_outputs(x)[..., 0, :], x @ (changed - weight).mT)
    assert_close(given[0].delta_weight(weight), changed - weight)
    layer.set_strengths([0.25])
    assert_close(layer(x), base(x) + 0.25 * x @ (changed - weight).mT)


@pytest.mark.fault("bias of DoRA")
@pytest.mark.parametrize("kind", ["wrapped", "bias of another name"])
def test_the_bias_of_a_layer_may_be_trained_and_loaded(kind):
    """It is read at each call, with its gradient, also in a compiled graph."""
    given, x = adapters(2, magnitude=True), tokens(5)
    base = BASES[kind](nn.Linear(IN, OUT, dtype=torch.float64)).eval()
    layer = GatedLoraLinear(base, given, gate=OpenGate(OUT))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    before, bias = layer(x), next(p for p in base.parameters() if p.ndim == 1)
    with torch.no_grad():
        bias += 3
    assert_close((layer(x), compiled(x)), (before + 3, before + 3))
    (gradient,) = torch.autograd.grad(layer(x).sum(), bias)
    assert_close(gradient, torch.full_like(bias, 5.0))
    other = BASES[kind](nn.Linear(IN, OUT, dtype=torch.float64)).eval()
    restored = GatedLoraLinear(other, gate=OpenGate(OUT))
    restored.load_state_dict(layer.state_dict())
    assert_close(restored(x), before + 3)


@pytest.mark.fault("bias of DoRA")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("bias", [True, False])
def test_magnitudes_on_a_layer_that_is_quantized_dynamically(bias):
    """Its weight and bias are methods. Inputs of two values are quantized exactly."""
    linear, x = nn.Linear(IN, OUT, bias=bias), (tokens(2, 5) > 0).float()
    (base,) = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    weight = base.weight().dequantize()
    given = [
        LowRank(*(t.float() if isinstance(t, torch.Tensor) else t for t in one))
        for one in adapters(2, magnitude=True)
    ]
    layer = GatedLoraLinear(base, given, gate=OpenGate(OUT))
    expected = x @ (weight + given[0].delta_weight(weight)).mT
    assert_close(layer(x), expected + linear.bias if bias else expected)
    siblings = GatedSiblings([base, nn.Linear(IN, 3)], gate=OpenGate(OUT + 3))
    siblings.set_adapters([side_by_side([given[0], None], (OUT, 3))])
    assert_close(siblings(x)[..., :OUT], layer(x))


@pytest.mark.fault("bias of DoRA")
def test_magnitudes_on_a_layer_that_is_stored_in_eight_bits():
    """Hooks of diffusers cast its weight and bias for each call."""
    hooks = pytest.importorskip("diffusers.hooks")
    base, x = nn.Linear(IN, OUT), tokens(5).float()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    hooks.apply_layerwise_casting(base, torch.float8_e4m3fn, torch.float32)
    given = [
        LowRank(*(t.float() if isinstance(t, torch.Tensor) else t for t in one))
        for one in adapters(2, magnitude=True)
    ]
    layer = GatedLoraLinear(base, given, gate=OpenGate(OUT))
    assert base.bias.dtype == torch.float8_e4m3fn
    assert_close(layer(x), x @ (weight + given[0].delta_weight(weight)).mT + bias)


class Bent(Wrapped):
    """A layer with an activation."""

    def forward(self, x):
        return self.inner(x).relu()


class OfTwo(Wrapped):
    """A layer of two inputs."""

    def forward(self, x, scale):
        return self.inner(x) * scale


@pytest.mark.fault("bias of DoRA")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Bent, "Bent does not compute a weight times its input plus a bias, which an adapter with"),
        (OfTwo, r"OfTwo cannot be called with inputs \(N, 6\): TypeError: "),
        (
            lambda linear: linear.to("meta"),
            r"Linear is on the device meta, where an adapter with a magnitude \(DoRA\) finds no w",
        ),
        (lambda linear: Wrapped(linear).to("meta"), "Wrapped is on the device meta, where an adap"),
    ],
)
def test_a_layer_whose_bias_cannot_be_known_is_refused(kind, message):
    base, given = kind(nn.Linear(IN, OUT, dtype=torch.float64)), adapters(2, magnitude=True)
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        GatedLoraLinear(base, given, gate=OpenGate(OUT))
    assert "\n" not in str(refused.value)
    GatedLoraLinear(base, adapters(2), gate=OpenGate(OUT))


def test_reading_a_weight_leaves_no_trace():
    base = Wrapped(nn.Linear(IN, OUT, dtype=torch.float64)).train()
    base.inner.eval()
    base.register_buffer("calls", torch.zeros(()))
    base.register_forward_pre_hook(lambda module, inputs: module.calls.add_(1) and None)
    state = torch.get_rng_state()
    GatedLoraLinear(base, adapters(2, magnitude=True), gate=OpenGate(OUT))
    assert torch.equal(torch.get_rng_state(), state)
    assert (base.calls, [module.training for module in base.modules()]) == (0, [True, False, True])


def test_magnitudes_under_a_gate_beside_plain_adapters(refuses):
    given, x = [*adapters(2, magnitude=True), *adapters(3, seed=4)], tokens(5).requires_grad_()
    layer = layer_of(given)
    loras = [x @ a.delta_weight(layer.base.weight.detach()).mT for a in given]
    expected = layer.gate(layer.base(x), torch.stack(loras, -2))
    assert_close((layer(x), layer.adapter_outputs(x)), (expected, torch.stack(loras, -2)))
    restored = layer_of(())
    restored.load_state_dict(layer.state_dict())
    assert_close(restored(x), expected)
    layer.set_adapters(given[1:])
    assert layer.base_gains is None
    refuses(
        ValueError,
        ("changes a weight by its rows", lambda: given[0].delta_weight()),
        (
            r"magnitude \(7,\) does not fit a layer of 8 outputs",
            lambda: layer.set_adapters([given[0]._replace(magnitude=torch.ones(7))]),
        ),
    )


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
    assert_close((layer(x), layer.to("meta").up), (other(x), other.up), rtol=0, atol=0)
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
    assert_close((model(x), detach_adapters(model)(x)), (reference(x), plain(x)), rtol=0, atol=0)
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
