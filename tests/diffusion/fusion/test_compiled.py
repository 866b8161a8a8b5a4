"""A compiled FLUX with adapters computes what the plain one does, whichever came first."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from core_gates.adapters import Room
from diffusion.evaluation.parity import relative_error
from diffusion.fusion import GatedFusion
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.embedded_base import UNIT, transformer_of


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return transformer_of("unit").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def call():
    draw = torch.Generator().manual_seed(1)
    width = UNIT["joint_attention_dim"]
    inputs = {
        "hidden_states": torch.randn(1, 4, UNIT["in_channels"], generator=draw),
        "encoder_hidden_states": torch.randn(1, 3, width, generator=draw),
        "pooled_projections": torch.randn(1, UNIT["pooled_projection_dim"], generator=draw),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }

    @torch.no_grad()
    def run(model):
        return model(**inputs)[0]

    return run


def adapter(model, seed, rank=2, where="blocks"):
    draw = torch.Generator().manual_seed(seed)
    modules = {
        name: Factors(
            torch.randn(rank, layer.in_features, generator=draw),
            0.2 * torch.randn(layer.out_features, rank, generator=draw),
            0.5,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and where in name
    }
    return LoraBundle("flux", modules)


def drawn(fusion):
    """With gates that are far from open."""
    torch.manual_seed(2)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


@pytest.fixture(scope="module")
def fusion(flux):
    """Of two adapters."""
    return drawn(GatedFusion(flux, [adapter(flux, seed) for seed in (1, 2)]))


@pytest.fixture(autouse=True)
def forgotten():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def test_a_model_that_is_compiled_first_takes_and_loses_adapters(flux, fusion, call):
    plain = call(flux)
    with fusion:
        fused = call(flux)
    assert not torch.allclose(fused, plain)
    model = compiled(flux)
    assert torch.equal(call(model), plain)
    with fusion:
        assert torch.equal(call(model), fused)
        fusion.set_strengths({"adapter": 0.0, "adapter-2": 0.0})
        assert torch.equal(call(model), plain)
        fusion.set_strengths({"adapter": 1.0, "adapter-2": 1.0})
        assert torch.equal(call(model), fused)
    assert torch.equal(call(model), plain)


def test_a_model_with_adapters_is_compiled_and_loses_them(flux, fusion, call):
    plain = call(flux)
    with fusion:
        fused = call(flux)
        model = compiled(flux)
        assert torch.equal(call(model), fused)
    assert torch.equal(call(model), plain)


def test_the_compiled_model_itself_may_be_given(flux, fusion, call):
    with fusion:
        fused = call(flux)
    model = compiled(flux)
    other = GatedFusion(model, fusion.adapters)
    other.load_state_dict(fusion.state_dict())
    assert other.family == "flux"
    with other:
        assert torch.equal(call(model), fused)
    assert not other.attached


def test_adapters_are_exchanged_without_compiling_again(flux, call):
    given = {"a": adapter(flux, 1), "b": adapter(flux, 2, rank=3, where="attn")}
    fewer = {"d": adapter(flux, 4, rank=4)}
    other = {"e": adapter(flux, 5, rank=1, where="attn"), "d": adapter(flux, 6)}
    more = {name: adapter(flux, 7 + k, rank=k + 1) for k, name in enumerate("xyz")}
    counted = CompileCounterWithBackend("aot_eager")
    model = torch.compile(flux, backend=counted)
    with drawn(GatedFusion(flux, given, room=Room(3, 4))) as fusion:
        found = call(model)
        first = counted.frame_count
        for number, adapters in enumerate((fewer, other, more)):
            fusion.set_adapters(adapters)
            fusion.set_strengths(dict.fromkeys(adapters, 0.5 + number))
            last, found = found, call(model)
            assert relative_error(found, call(flux)) <= 1e-5
            assert relative_error(found, last) > 1e-3
    assert counted.frame_count == first > 0
