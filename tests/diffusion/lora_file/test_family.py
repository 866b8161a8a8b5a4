"""Names and sizes of layers, from published figures."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffusion.lora_file import FluxShape, SD3Shape

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora"


def test_published_flux():
    fused = FluxShape().fused()
    assert (len(fused), len({layer.name for layer in fused})) == (304, 304)
    assert len({layer.type for layer in fused}) == 13
    assert sum(layer.out_features for layer in fused) == 3_035_136
    sizes = {layer.type: (layer.in_features, layer.out_features) for layer in fused}
    assert sizes["attn.a_to_qkv"] == sizes["attn.b_to_qkv"] == (3072, 9216)
    assert (sizes["to_qkv_mlp"], sizes["proj_out"]) == ((3072, 21504), (15360, 3072))
    assert (sizes["norm1_a.linear"], sizes["norm.linear"]) == ((3072, 18432), (3072, 9216))
    assert sizes["ff_b.2"] == (12288, 3072)


def test_parameters_of_published_encoder_and_gates():
    fused = FluxShape().fused()
    by_type = {layer.type: layer.out_features for layer in fused}
    projections = sum(768 * outputs + 768 for outputs in by_type.values())
    probes = sum(layer.in_features for layer in fused)
    assert (round(projections / 1e6, 1), round(probes / 1e6, 2)) == (96.7, 1.75)
    assert round(9 * sum(layer.out_features for layer in fused) / 1e6, 1) == 27.3
    assert round(8 * sum(layer.out_features for layer in fused) / 1e6, 1) == 24.3
    assert round(16 * sum(la.in_features + la.out_features for la in fused) / 1e6, 1) == 76.6


def test_order_of_the_published_encoder():
    with np.load(GOLDEN / "encoder_a.npz") as golden:
        meta = json.loads(str(golden["meta"]))
        fused = FluxShape(meta["n_double"], meta["n_single"], 1, meta["d"]).fused()
        assert [layer.name for layer in fused] == meta["order"]
        assert [layer.type for layer in fused] == meta["types"]
        for layer in fused:
            assert golden[f"lora0.{layer.name}.lora_A.weight"].shape[1] == layer.in_features
            assert golden[f"lora0.{layer.name}.lora_B.weight"].shape[0] == layer.out_features


def test_tiny_flux():
    shape = FluxShape(2, 4, 6, 32, context_dim=384, pooled_dim=384, guidance=False)
    assert len(shape.fused()) == 32
    modules = shape.modules()
    assert len([name for name in modules if "blocks." in name]) == 52
    assert (modules["x_embedder"], modules["context_embedder"]) == ((64, 192), (384, 192))
    assert modules["time_text_embed.text_embedder.linear_1"] == (384, 192)
    assert not any("guidance" in name for name in modules)
    assert sum(i * o for i, o in modules.values()) == pytest.approx(5.25e6, rel=0.01)


def test_parameters_of_flux_dev():
    modules = FluxShape().modules()
    assert len(modules) == 10 + 19 * 14 + 38 * 6
    assert sum(i * o for i, o in modules.values()) == pytest.approx(11.9e9, rel=0.01)
    assert modules["norm_out.linear"] == (3072, 6144)
    assert modules["time_text_embed.guidance_embedder.linear_1"] == (256, 3072)


def test_sd3_medium():
    modules = SD3Shape().modules()
    count = Counter(name.split(".")[1] for name in modules if "blocks." in name)
    assert (len(count), set(count.values())) == (24, {14, 11})
    assert modules["transformer_blocks.0.norm1_context.linear"] == (1536, 9216)
    assert modules["transformer_blocks.23.norm1_context.linear"] == (1536, 3072)
    assert "transformer_blocks.23.attn.to_add_out" not in modules
    assert "transformer_blocks.23.attn.add_k_proj" in modules
    assert modules["proj_out"] == (1536, 64)
    assert sum(i * o for i, o in modules.values()) == pytest.approx(2.03e9, rel=0.03)
    assert len(SD3Shape().fused()) == 24 * 10 - 3


def test_sd35_medium_has_a_second_attention():
    shape = SD3Shape(dual_attention=tuple(range(13)))
    modules = shape.modules()
    assert modules["transformer_blocks.12.norm1.linear"] == (1536, 9 * 1536)
    assert modules["transformer_blocks.13.norm1.linear"] == (1536, 6 * 1536)
    assert "transformer_blocks.12.attn2.to_q" in modules
    assert "transformer_blocks.13.attn2.to_q" not in modules
    assert len(shape.fused()) == 24 * 10 - 3 + 2 * 13
