"""Which layers an encoder reads, and how an adapter fits them."""

import pytest

from diffusion.lora_file import FluxShape, LoraFileError, SD3Shape
from diffusion.retrieval import modules_of, types_used
from diffusion.retrieval.encoder_config import family_of, fit


def test_a_layer_of_another_size_gets_its_own_type():
    modules = modules_of(SD3Shape())
    sizes = {}
    for module in modules:
        assert sizes.setdefault(module.type, module.out_features) == module.out_features
    last = [module for module in modules if module.name == "blocks.23.norm1_b.linear"]
    assert [module.type for module in last] == ["norm1_b.linear.3072"]
    assert not any(m.name.startswith("blocks.23.ff_b") for m in modules)
    assert family_of(SD3Shape()) == "sd3"


def test_types_choose_layers(adapter, one_line):
    shape = FluxShape(1, 2, num_heads=2, head_dim=8)
    chosen = modules_of(shape, ("to_qkv_mlp", "attn.a_to_out"))
    assert [m.type for m in chosen] == ["attn.a_to_out", "to_qkv_mlp", "to_qkv_mlp"]
    message = one_line(LoraFileError, modules_of, shape, ("attn.c",))
    assert "attn.c" in message
    assert "to_qkv_mlp" in message
    with pytest.raises(LoraFileError, match="none"):
        modules_of(shape, ())
    used = types_used(shape, [adapter(0, types=("ff_a.0",)), adapter(1, types=("attn.a_to_qkv",))])
    assert used == ("attn.a_to_qkv", "ff_a.0")


def test_fit_names_what_is_missing_and_misfitting(adapter):
    shape = FluxShape(1, 2, num_heads=2, head_dim=8)
    bundle = adapter(0, types=("ff_a.0", "norm1_a.linear"))
    found = fit(bundle, modules_of(shape, ("ff_a.0", "proj_out")))
    assert found.read == 1
    assert found.missing == ("single_blocks.0.proj_out", "single_blocks.1.proj_out")
    assert found.misfits == ()
    other = FluxShape(1, 2, num_heads=3, head_dim=8)
    assert fit(bundle, modules_of(other)).misfits[0] == (
        "transformer_blocks.0.ff.net.0.proj is 16 → 64, expected 24 → 96"
    )
