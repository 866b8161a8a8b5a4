from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates.adapters.gated_lora import GatedLoraLinear
from core_gates.adapters.lora_gate import AdapterContext, LoraGate, OpenGate
from core_gates.adapters.low_rank import LowRank
from tests.core_gates.drawn import filled, randn

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora" / "gated_linear_a.npz"
IN, OUT = 6, 8


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def adapters(*ranks, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [LowRank(factor(r, IN), factor(OUT, r), 0.5 + k) for k, r in enumerate(ranks)]


def random_module(*ranks, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = GatedLoraLinear(
        nn.Linear(IN, OUT, dtype=dtype),
        adapters(*ranks, dtype=dtype),
        gate=LoraGate(OUT, dtype=dtype, **options),
    )
    filled(module.gate)
    return module


def inputs(*leading, dtype=torch.float64):
    return randn(*leading, IN, seed=1, dtype=dtype)


def golden_module(golden, chosen):
    linear = nn.Linear(20, 28, dtype=torch.float64)
    linear.weight.data, linear.bias.data = golden["W"].clone(), golden["b"].clone()
    factors = [
        LowRank(golden[f"A{k}"], golden[f"B{k}"], golden["alphas"][k].item()) for k in chosen
    ]
    return GatedLoraLinear(linear, factors, gate=LoraGate(28, dtype=torch.float64))


@pytest.mark.parametrize(
    ("chosen", "trained", "expected"),
    [(range(3), False, "naive"), (range(3), True, "gated"), ([0, 2], True, "gated_missing")],
)
def test_golden(golden, chosen, trained, expected):
    """At its start the gate is the plain sum."""
    module = golden_module(golden, chosen)
    for name, parameter in module.gate.named_parameters():
        if trained:
            parameter.data.copy_(golden[f"gate.{name}"])
    assert_close(module(golden["x"]), golden[expected], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["full", "no_base", "no_cross", "no_lora"])
def test_equals_the_gate_over_full_outputs(variant):
    module, x = random_module(1, 4, 2, variant=variant), inputs(2, 5).requires_grad_()
    tensors = x, *module.parameters()

    def explicit(x):
        return module.gate(module.base(x), module.adapter_outputs(x))

    assert_close(module(x), explicit(x))
    cotangent = torch.randn(2, 5, OUT, dtype=torch.float64)
    expected = torch.autograd.grad(explicit(x), tensors, cotangent)
    assert_close(torch.autograd.grad(module(x), tensors, cotangent), expected)


def test_outputs_of_the_adapters():
    module, x = random_module(1, 4, 2), inputs(5)
    outputs = module.adapter_outputs(x)
    for k, adapter in enumerate(adapters(1, 4, 2)):
        assert_close(outputs[:, k], x @ adapter.delta_weight().T)


def told(module, kinds, scores=(), **options):
    """Give a layer a context."""
    module.context = AdapterContext(3, **options).double()
    module.context.describe(kinds, scores)
    return module


@pytest.mark.parametrize("make", [LoraGate, OpenGate])
def test_factors_start_as_none_and_weigh_by_kind_and_number(make):
    x, linear = inputs(2, 5), nn.Linear(IN, OUT, dtype=torch.float64)
    gate = make(OUT, kinds=3, dtype=torch.float64)
    module = GatedLoraLinear(linear, adapters(2, 3), gate=gate)
    plain = linear(x) + module.adapter_outputs(x).sum(-2)
    assert_close(told(module, [1, 2])(x), plain)
    with torch.no_grad():
        gate.factors.copy_(torch.tensor([[0.5, 0.25, -2.0], [3.0, 0.0, 1.0]]))
    first, second = (x @ one.delta_weight().T for one in adapters(2, 3))
    for kinds, weights in (
        ([1, 2], (0.75, -1.5)), ([2, 1], (-1.5, 0.75)), ([0, 0], (0.5, 0.5)), ([0, 2], (0.5, -1.5)),
    ):  # fmt: skip
        found = told(module, kinds).adapter_outputs(x)
        assert_close(found, torch.stack([weights[0] * first, weights[1] * second], -2))
        assert_close(module(x), gate(linear(x), found))
    found = told(module, [0, 2, 1]).adapter_outputs(x)  # the third changes other layers
    assert_close(found, torch.stack([3 * first, 4 * second], -2))
    (grad,) = torch.autograd.grad(module(x).sum(), gate.factors)
    assert (grad.abs() > 0).tolist() == [[False] * 3, [True, False, True]]


def test_a_switch_turns_adapters_off_by_their_scores():
    module, x = random_module(2, 3), inputs(2, 5)
    plain = module(x)
    assert_close(told(module, [0, 0], [0.5, None])(x), plain)  # no switch
    context = told(module, [0, 0], [0.5, None], switch=True).context
    assert_close(context.opening(), torch.tensor([0.98201379, 1.0]).double())
    with torch.no_grad():
        context.switch.copy_(torch.tensor([1.0, 0.2, -0.3]))
    context.describe([0, 0], [0.7, 0.1])
    opening = torch.tensor([1 + 1.4, 1 + 0.2 - 1.8], dtype=torch.float64).sigmoid()
    assert_close(context.opening(), opening)
    found = module(x)
    values = module.gate_values(x)
    assert all(torch.autograd.grad(found.sum(), context.switch)[0].abs() > 0)
    module.context = None
    module.set_strengths(opening)
    assert_close((found, values), (module(x), module.gate_values(x) * opening.unsqueeze(-1)))


def test_gate_values_are_those_of_the_gate():
    module, x = random_module(1, 4, 2), inputs(2, 5)
    gates = module.gate_values(x)
    assert gates.shape == (2, 5, 3, OUT)
    mixed = (gates * module.adapter_outputs(x)).sum(-2) * module.gate.weight_out
    assert_close(module(x), module.base(x) + mixed)


def test_without_adapters_the_layer_is_untouched():
    module, x = random_module(), inputs(5)
    assert torch.equal(module(x), module.base(x))
    assert module.gate_values(x).shape == (5, 0, OUT)
    module.set_adapters(adapters(2))
    assert not torch.equal(module(x), module.base(x))
    module.set_adapters([])
    assert torch.equal(module(x), module.base(x))


def test_rank_zero_is_no_adapter():
    module, x = random_module(2, 3), inputs(5)
    expected = module(x)
    first, second = adapters(2, 3)
    module.set_adapters([first, LowRank(torch.empty(0, IN), torch.empty(OUT, 0)), second])
    assert module.ranks == [2, 3]
    assert_close(module(x), expected)


def test_adapters_are_exchanged_under_a_trained_gate():
    module, x = random_module(2, 3), inputs(5)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    module.set_adapters(adapters(1, 1, 1, 1, seed=5))
    other = random_module(1, 1, 1, 1)
    other.load_state_dict(state)
    assert other.ranks == [2, 3]
    other.set_adapters(adapters(1, 1, 1, 1, seed=5))
    assert_close(module(x), other(x), rtol=0, atol=0)
    gate = {name: t for name, t in module.state_dict().items() if name.startswith("gate.")}
    assert_close(gate, {name: state[name] for name in gate}, rtol=0, atol=0)


@pytest.mark.fault("core F7")
@pytest.mark.parametrize("ranks", [(), (2,), (1, 4, 2)])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_restores_the_adapters(tmp_path, ranks, assign):
    module, x = random_module(2, 3), inputs(5)
    torch.save(nn.Sequential(module).state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    restored = random_module(*ranks)
    nn.Sequential(restored).load_state_dict(state, assign=assign)
    assert restored.ranks == [2, 3]
    assert_close(restored(x), module(x), rtol=0, atol=0)
    before = random_module()
    restored.load_state_dict(before.state_dict())
    assert torch.equal(restored(x), before(x))


@pytest.mark.fault("core F7")
def test_a_checkpoint_without_adapters_is_refused_with_advice():
    module, plain = random_module(2, 3), random_module(2, 3).base
    with pytest.raises(RuntimeError, match="attach adapters after loading"):
        nn.Sequential(module).load_state_dict({f"0.{k}": v for k, v in plain.state_dict().items()})
    state = random_module(2, 3).state_dict()
    with pytest.raises(RuntimeError, match="ranks of its adapters sum to 4, its factors to 5"):
        module.load_state_dict(state | {"adapter_ranks": torch.tensor([2, 2])})


def test_inference_gives_the_numbers_of_training_and_keeps_what_others_hold():
    module, x = random_module(2, 3), inputs(2, 5)
    expected, base = module(x).detach(), module.base(x).detach()
    kept = []
    with torch.no_grad():
        assert_close(module(x), expected, rtol=0, atol=0)
        hook = module.base.register_forward_hook(
            lambda _module, _inputs, output: kept.append(output)
        )
        assert_close(module(x), expected, rtol=0, atol=0)
        hook.remove()
        assert_close(kept[0], base, rtol=0, atol=0)


@pytest.mark.fault("core F8")
@pytest.mark.parametrize("how", ["global hook", "replaced forward"])
def test_inference_overwrites_nothing_that_others_may_hold(how):
    module, x = random_module(2, 3), inputs(2, 5)
    with torch.no_grad():
        expected, kept = module.base(x), []

        def keep(output):
            kept.append(output)
            return output

        if how == "global hook":
            hook = nn.modules.module.register_module_forward_hook(
                lambda seen, _inputs, output: kept.append(output) if seen is module.base else None
            )
            module(x)
            hook.remove()
        else:  # as libraries do that move weights between devices
            linear = module.base.forward
            module.base.forward = lambda x: keep(linear(x))
            module(x)
    assert_close(kept, [expected], rtol=0, atol=0)


class Passing(nn.Module):
    """A layer that returns its input, which belongs to the caller."""

    in_features = out_features = OUT

    def forward(self, x):
        return x


def test_the_output_of_an_unknown_layer_is_never_overwritten():
    ones = LowRank(torch.ones(1, OUT), torch.ones(OUT, 1))
    module, x = GatedLoraLinear(Passing(), [ones]), torch.ones(4, OUT)
    with torch.no_grad():
        assert_close(module(x), torch.full_like(x, 1.0 + OUT))
    assert torch.equal(x, torch.ones_like(x))


def test_film_takes_one_time_or_one_a_sample(refuses):
    module, x = random_module(2, 3, time="film"), inputs(2, 5)
    times = torch.tensor([30.0, 700.0], dtype=torch.float64)
    together = module(x, time=times)
    for i in range(2):
        assert_close(module(x[i], time=times[i]), together[i])
        assert_close(module.gate_values(x[i], time=times[i]), module.gate_values(x, time=times)[i])
    assert_close(together, module.gate(module.base(x), module.adapter_outputs(x), time=times))
    refuses(ValueError, ("pass time=", lambda: module(x)))


@pytest.mark.fault("core F7")
@pytest.mark.parametrize("leading", [(), (1,), (3,), (3, 5)])
def test_one_time_in_a_list_is_one_time(leading):
    module, x = random_module(2, 3, time="film"), inputs(*leading)
    time = torch.tensor(30.0, dtype=torch.float64)
    assert_close(module(x, time=time.view(1)), module(x, time=time))
    assert_close(module.gate_values(x, time=time.view(1)), module.gate_values(x, time=time))


@pytest.mark.fault("core F7")
@pytest.mark.parametrize("leading", [(0,), (0, 5)])
def test_an_empty_batch_may_have_a_time_a_sample(leading):
    module, x = random_module(2, 3, time="film"), inputs(*leading).requires_grad_()
    out = module(x, time=torch.empty(0))
    assert out.shape == (*leading, OUT)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert module.gate_values(x, time=torch.empty(0)).shape == (*leading, 2, OUT)


@pytest.mark.fault("core F7")
@pytest.mark.parametrize("shape", [(2,), (0,), (3, 1)])
def test_times_that_fit_no_batch_are_refused(refuses, shape):
    module, x = random_module(2, 3, time="film"), inputs(3, 5)
    message = (
        rf"time \({', '.join(map(str, shape))},?\) must be one number, or one a sample: \(3,\)"
    )
    for call in (module, module.gate_values):
        refuses(ValueError, (message, lambda call=call: call(x, time=torch.zeros(shape))))


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0), (2, 3, 4)])
def test_shapes(leading):
    module, x = random_module(2, 3), inputs(*leading).requires_grad_()
    out = module(x)
    assert out.shape == (*leading, OUT)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert module.gate.bias.grad is not None


def test_autocast_gates_in_float32():
    module, x = random_module(2, 3, dtype=torch.float32), inputs(50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, base = module(x), module.base(x)
        hidden = nn.functional.linear(x, module.down)
    assert out.dtype == torch.bfloat16
    loras = torch.stack(
        [
            h.float() @ u
            for h, u in zip(hidden.split([2, 3], -1), module.up.split([2, 3]), strict=True)
        ],
        -2,
    )
    assert_close(out, module.gate(base.float(), loras).bfloat16(), rtol=1e-2, atol=1e-3)


def test_activation_checkpointing_is_exact():
    module, x = random_module(2, 3), inputs(5).requires_grad_()
    tensors = x, *module.gate.parameters()
    plain = torch.autograd.grad(module(x).square().sum(), tensors)
    again = checkpoint(module, x, use_reentrant=False).square().sum()
    assert_close(torch.autograd.grad(again, tensors), plain, rtol=0, atol=0)


def test_compiles_into_one_graph():
    module, x = random_module(2, 3), inputs(5).requires_grad_()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    tensors = x, *module.gate.parameters()
    expected = torch.autograd.grad(module(x).square().sum(), tensors)
    assert_close(torch.autograd.grad(compiled(x).square().sum(), tensors), expected)


def test_misfits_are_refused(refuses):
    linear = nn.Linear(IN, OUT)
    refuses(
        ValueError,
        (
            r"do not fit a layer of 6 inputs and 8 outputs",
            lambda: GatedLoraLinear(linear, [LowRank(torch.zeros(2, IN + 1), torch.zeros(OUT, 2))]),
        ),
        (
            r"expected \(r, 6\) and \(8, r\)",
            lambda: GatedLoraLinear(linear, [LowRank(torch.zeros(2, IN), torch.zeros(OUT, 3))]),
        ),
        (
            "gate has 6 features, but the layer has 8 outputs",
            lambda: GatedLoraLinear(linear, gate=LoraGate(IN)),
        ),
    )
