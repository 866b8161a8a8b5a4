from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core_gates.adapters.lora_gate import LoraGate, time_features
from tests.core_gates.drawn import filled, randn

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora"
VARIANTS = ["full", "no_base", "no_cross", "no_lora"]


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def random_gate(dim, **options):
    return filled(LoraGate(dim, dtype=torch.float64, **options), seed=0)


def values(*shape):
    return randn(*shape, seed=1)


def folded(gate, base, loras, time=None):
    """The gate by its coefficients."""
    constant, slope, lora, cross, out = gate.coefficients(time)
    norm = torch.nn.functional.layer_norm
    n, z = (norm(t, t.shape[-1:]) for t in (base.unsqueeze(-2), loras))
    return base + out * (torch.sigmoid(constant + slope * n + (lora + cross * n) * z) * loras).sum(
        -2
    )


@pytest.mark.parametrize("file", ["gate_a", "gate_b"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(file, variant):
    vectors = golden(file)
    gate = LoraGate(vectors["base"].shape[-1], variant=variant, dtype=torch.float64)
    used = {name.removeprefix(f"{variant}.g.") for name in vectors if f"{variant}.g." in name}
    assert {name for name, _ in gate.named_parameters()} == used
    for name, parameter in gate.named_parameters():
        parameter.data.copy_(vectors[f"{variant}.w.{name}"])
    base = vectors["base"].clone().requires_grad_()
    loras = vectors["loras"].clone().requires_grad_()
    out = gate(base, loras.movedim(0, -2))
    assert_close(out, vectors[f"{variant}.out"], rtol=1e-9, atol=1e-12)
    out.backward(vectors["cotangent"])
    assert_close(base.grad, vectors[f"{variant}.dbase"], rtol=1e-9, atol=1e-12)
    assert_close(loras.grad, vectors[f"{variant}.dloras"], rtol=1e-9, atol=1e-12)
    for name, parameter in gate.named_parameters():
        expected = vectors[f"{variant}.g.{name}"]
        assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_coefficients_fold_every_parameter(variant):
    gate, base, loras = random_gate(8, variant=variant), values(5, 8), values(5, 3, 8)
    assert_close(folded(gate, base, loras), gate(base, loras))
    names, parameters = zip(*gate.named_parameters(), strict=True)
    cotangent = values(5, 8)
    expected = torch.autograd.grad(gate(base, loras), parameters, cotangent)
    actual = torch.autograd.grad(folded(gate, base, loras), parameters, cotangent)
    assert_close(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_starts_as_the_plain_sum(variant):
    gate = LoraGate(8, variant=variant, dtype=torch.float64)
    base, loras = values(5, 8), values(5, 3, 8)
    assert_close(gate(base, loras), base + loras.sum(-2))
    gate(base, loras).square().sum().backward()
    for name, parameter in gate.named_parameters():
        if name.startswith("weight"):
            assert parameter.grad.abs().min() > 0, name


def test_published_initialization():
    torch.manual_seed(0)
    gate = LoraGate(4000, initialization="published")
    for parameter in (gate.weight_base, gate.weight_lora, gate.weight_cross, gate.bias):
        assert abs(parameter.mean()) < 0.1
        assert 0.95 < parameter.std() < 1.05
    assert_close(gate.weight_out, torch.full((4000,), 0.512))
    assert_close(gate.norm_lora.weight, torch.ones(4000))


def test_one_gate_serves_any_number_of_adapters_in_any_order():
    gate, base, loras = random_gate(8), values(5, 8), values(5, 4, 8)
    gates = gate.gate_values(base, loras)
    assert gates.shape == (5, 4, 8)
    assert gates.min() > 0
    assert gates.max() < 1
    assert_close(gate.gate_values(base, loras[:, 2:3]), gates[:, 2:3])
    assert_close(gate(base, loras[:, [3, 1, 0, 2]]), gate(base, loras))
    parts = [gate(base, loras[:, k : k + 1]) - base for k in range(4)]
    assert_close(gate(base, loras), base + sum(parts))


def test_film_adds_the_time_to_the_bias():
    gate, base, loras = random_gate(8, time="film"), values(2, 5, 8), values(2, 5, 3, 8)
    times = torch.tensor([30.0, 700.0], dtype=torch.float64)
    together = gate(base, loras, time=times)
    plain = LoraGate(8, dtype=torch.float64)
    plain.load_state_dict(gate.state_dict(), strict=False)
    for i, time in enumerate(times):
        alone = gate(base[i], loras[i], time=time)
        assert_close((together[i], folded(gate, base[i], loras[i], time)), (alone, alone))
        plain.bias.data = gate.bias.data + gate.weight_time.data @ time_features(time)
        assert_close(plain(base[i], loras[i]), alone)
    assert (together[0] - gate(base[0], loras[0], time=times[1])).abs().max() > 0.01


def test_film_starts_without_the_time():
    gate = LoraGate(8, time="film", dtype=torch.float64)
    base, loras = values(5, 8), values(5, 3, 8)
    out = gate(base, loras, time=torch.tensor(500.0))
    assert_close(out, base + loras.sum(-2))
    out.square().sum().backward()
    assert gate.weight_time.grad.abs().sum() > 0


def test_time_features_are_sinusoids():
    features = time_features(torch.tensor([0.0, 7.0], dtype=torch.float64))
    assert_close(features[0], torch.tensor([1.0] * 8 + [0.0] * 8, dtype=torch.float64))
    angles = 7.0 / 10000 ** (torch.arange(8, dtype=torch.float64) / 8)
    assert_close(features[1], torch.cat([angles.cos(), angles.sin()]))


def test_the_time_must_be_given(refuses):
    gate = LoraGate(8, time="film")
    refuses(
        ValueError,
        (
            "needs the diffusion time: pass time=",
            lambda: gate(torch.zeros(2, 8), torch.zeros(2, 1, 8)),
        ),
        ("needs the diffusion time: pass time=", lambda: gate.coefficients()),
    )


def test_coefficients_of_several_times_are_those_of_each():
    gate, times = random_gate(8, time="film"), torch.tensor([3.0, 700.0], dtype=torch.float64)
    expected = torch.stack([gate.coefficients(time) for time in times])
    assert expected.shape == (2, 5, 8)
    assert not torch.allclose(expected[0, 0], expected[1, 0])
    assert_close(gate.coefficients(times), expected)


def test_half_precision_is_gated_in_float32():
    gate, base, loras = LoraGate(8), values(5, 8).bfloat16(), values(5, 3, 8).bfloat16()
    torch.nn.init.normal_(gate.weight_cross)
    out = gate(base, loras)
    assert_close(out, gate(base.float(), loras.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["variant", "initialization", "time"])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=f"{option} is 'all'; choose one of"):
        LoraGate(8, **{option: "all"})
