"""A compiled FLUX with adapters computes what the plain one does, whichever came first."""

import pytest
import torch
from torch import nn

from diffusion.fusion import GatedFusion
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.tiny_flux import UNIT, transformer_of


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


@pytest.fixture(scope="module")
def fusion(flux):
    """Of two adapters, with gates that are far from open."""
    adapters = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        adapters.append(
            LoraBundle(
                "flux",
                {
                    name: Factors(
                        torch.randn(2, layer.in_features, generator=draw),
                        0.2 * torch.randn(layer.out_features, 2, generator=draw),
                        0.5,
                    )
                    for name, layer in flux.named_modules()
                    if isinstance(layer, nn.Linear) and "blocks" in name
                },
            )
        )
    made = GatedFusion(flux, adapters)
    torch.manual_seed(2)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


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
