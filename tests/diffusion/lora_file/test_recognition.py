"""Which family a file or a folder is of, and names taken apart."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion.lora_file import (
    ContainerError,
    FamilyError,
    FluxShape,
    MappingError,
    SafetensorsFile,
    SD3Shape,
    load_lora,
    recognize_file,
)
from diffusion.lora_file.names import TABLES
from diffusion.lora_file.recognition import modules_in, recognize

OTHERS = {
    "sdxl": ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
             "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
    "sd1": ["lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"],
    "flux2": ["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"],
    "chroma": ["diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight"],
    "qwen-image": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                   "transformer.transformer_blocks.0.img_mod.1.lora_A.weight"],
    "hunyuan-video": ["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight"],
    "wan": ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"],
    "wan ": ["lora_unet_blocks_0_cross_attn_k.lora_down.weight"],
    "hidream": ["transformer.double_stream_blocks.0.block.attn1.to_q.lora_A.weight"],
    "auraflow": ["transformer.joint_transformer_blocks.0.attn.to_q.lora_A.weight"],
    "z-image": ["diffusion_model.layers.0.attention.to_q.lora_A.weight"],
    "lumina2": ["diffusion_model.layers.0.attention.qkv.lora_A.weight"],
    "ltx-video": ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"],
}  # fmt: skip


def stored(tmp_path, tensors, metadata=None):
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def pair(layer, d=16, outputs=None, rank=1):
    return {
        f"{layer}.lora_A.weight": torch.ones(rank, d),
        f"{layer}.lora_B.weight": torch.ones(outputs or d, rank),
    }


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family, tmp_path, one_line):
    shape = (4, 768)
    path = stored(tmp_path, {n: torch.ones(shape) for n in OTHERS[family]}, {"title": "kept"})
    file = SafetensorsFile(path)
    assert (recognize_file(file)[0], file.metadata) == (family.strip(), {"title": "kept"})
    for base in (None, "flux", "sd3"):
        for strict in (True, False):
            message = one_line(FamilyError, load_lora, path, base, strict=strict)
            assert f"adapter for {family.strip()}" in message


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.name} {table.family}")
def test_no_layer_of_ours_is_taken_for_another_family(table, tmp_path):
    for name in table.rows:
        for spelled in (name, name.replace(".", "_")):
            for prefix in ("", "transformer.", "lora_unet_", "base_model.model."):
                key = f"{prefix}{spelled}.lora_A.weight".replace("{i}", "3")
                assert recognize({key: (1, 16)}, {}, [table.family])[0] == table.family, key


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "sd3"),
        ({"ss_base_model_version": "sd3_m"}, "sd3"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"ss_base_model_version": "qwen_image"}, "qwen-image"),
        ({"ss_sd_model_name": "flux1-dev.safetensors"}, "flux"),
        ({"modelspec.architecture": "flux.2-dev/lora"}, "flux2"),
        ({}, "flux"),
    ],
)
def test_metadata_decides_where_names_do_not(metadata, family, tmp_path):
    path = stored(tmp_path, pair("transformer.transformer_blocks.0.attn.to_q"), metadata)
    assert recognize_file(SafetensorsFile(path))[0] == family


def test_metadata_does_not_overrule_names(tmp_path):
    tensors = pair("lora_unet_double_blocks_0_img_attn_proj")
    path = stored(tmp_path, tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert load_lora(path).family == "flux"


@pytest.mark.parametrize(
    ("block", "width", "family"),
    [(18, 3072, "flux"), (30, 3072, "qwen-image"), (59, 3072, "qwen-image"), (23, 1536, "sd3"),
     (0, 1536, "sd3"), (37, 2432, "sd3"), (0, 16, "flux")],
)  # fmt: skip
def test_sizes_decide_last(block, width, family, tmp_path):
    path = stored(tmp_path, pair(f"transformer.transformer_blocks.{block}.attn.to_q", width))
    assert recognize_file(SafetensorsFile(path))[0] == family


def layers_of(shape, prefix="transformer."):
    return {
        f"{prefix}{name}.lora_{factor}.weight": size
        for name, (inputs, outputs) in shape.modules().items()
        for factor, size in (("A", (1, inputs)), ("B", (outputs, 1)))
    }


@pytest.mark.fault("diffusion D1")
@pytest.mark.parametrize(
    ("shape", "family"),
    [(SD3Shape(), "sd3"), (SD3Shape(dual_attention=tuple(range(13))), "sd3"),
     (SD3Shape(38, 38, 64), "sd3"), (FluxShape(), "flux"), (FluxShape(57, 0), "qwen-image")],
)  # fmt: skip
def test_files_of_all_layers_without_metadata(shape, family):
    shapes = {n: size for n, size in layers_of(shape).items() if ".single_" not in n}
    outer = ("x_embedder", "guidance_embedder")
    shapes = {n: size for n, size in shapes.items() if not any(o in n for o in outer)}
    assert recognize(shapes, {}, ["flux", "sd3"])[0] == family


@pytest.mark.fault("diffusion D1")
def test_sd3_medium_of_diffusers_is_read(tmp_path):
    path = stored(tmp_path, {n: torch.ones(size) for n, size in layers_of(SD3Shape()).items()})
    bundle = load_lora(path)
    assert (bundle.family, len(bundle.modules)) == ("sd3", len(SD3Shape().modules()))
    assert bundle.sizes()["transformer_blocks.23.norm1_context.linear"][1:] == (1536, 3072)


@pytest.mark.fault("diffusion D8")
@pytest.mark.parametrize("form", ["lora", "loha", "lokr"])
def test_small_files_of_sd3_are_no_misfits_of_flux(form, tmp_path):
    sizes = SD3Shape(2, 2, 8).modules()
    tensors = {}
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.norm1_context.linear"):
        (inputs, outputs), stem = sizes[name], f"transformer.{name}"
        if form == "lora":
            tensors |= pair(stem, inputs, outputs)
        elif form == "loha":
            tensors |= {f"{stem}.hada_w{n}_a": torch.ones(outputs, 1) for n in (1, 2)}
            tensors |= {f"{stem}.hada_w{n}_b": torch.ones(1, inputs) for n in (1, 2)}
        else:
            tensors[f"{stem}.lokr_w1"] = torch.ones(2, 2)
            tensors[f"{stem}.lokr_w2"] = torch.ones(outputs // 2, inputs // 2)
    bundle = load_lora(stored(tmp_path, tensors))
    assert (bundle.family, bundle.report.evidence) == ("sd3", "sizes of layers")
    assert len(bundle.modules) == 2
    assert not bundle.report.unused


def test_an_assumption_is_noted(tmp_path):
    path = stored(tmp_path, pair("transformer_blocks.0.attn.to_q"))
    report = load_lora(path).report
    assert "flux is assumed" in report.evidence
    assert "flux is assumed" in report.notes[0]
    assert load_lora(path, "sd3").family == "sd3"
    assert load_lora(path, "sd3").report.evidence == "the base"


SHAPE = FluxShape(1, 1, 2, 8, context_dim=24, guidance=False)


@pytest.mark.parametrize(
    ("layer", "d", "outputs", "words"),
    [
        ("transformer_blocks.0.attn.to_q", 8, 8, "8 → 8 features, expected 16 → 16"),
        ("transformer_blocks.0.attn.to_q", 48, 16, "expected 16 → 16"),
        ("transformer_blocks.1.attn.to_q", 16, 16, "the base has no layer transformer_blocks.1"),
        ("single_transformer_blocks.0.proj_mlp", 16, 48, "expected 16 → 64"),
        ("single_blocks.0.linear1", 16, 111, "expected 16 → 16 + 16 + 16 + 64"),
        ("double_blocks.0.img_attn.qkv", 16, 112, "expected 16 → 16 + 16 + 16"),
        ("guidance_in.in_layer", 256, 16, "the base has no layer time_text_embed.guidance"),
        ("x_embedder", 128, 16, "expected 64 → 16"),
    ],
)
def test_shapes_of_the_base(layer, d, outputs, words, tmp_path, one_line):
    path = stored(tmp_path, pair(layer, d, outputs))
    assert words in one_line(MappingError, load_lora, path, SHAPE.modules())
    assert len(load_lora(path, SHAPE.modules(), strict=False).modules) == 0


@pytest.mark.parametrize("shape", [FluxShape(1, 2, 2, 8), SD3Shape(2, 2, 8, dual_attention=(0,))])
def test_every_layer_of_a_base_fits_it(shape, tmp_path):
    modules = shape.modules()
    tensors = {}
    for name, (inputs, outputs) in modules.items():
        tensors |= pair(f"transformer.{name}", inputs, outputs)
    path = stored(tmp_path, tensors)
    for base in (modules, None, "flux" if isinstance(shape, FluxShape) else "sd3"):
        assert {n: s[1:] for n, s in load_lora(path, base).sizes().items()} == modules
    other = "sd3" if isinstance(shape, FluxShape) else "flux"
    with pytest.raises(FamilyError, match=f"the base is {other}"):
        load_lora(path, other)


def test_a_wide_linear1_without_a_base(tmp_path, one_line):
    path = stored(tmp_path, pair("single_blocks.0.linear1", 16, 9 * 16))
    assert "expected 16 → 16 + 16 + 16 + 64" in one_line(MappingError, load_lora, path)
    path = stored(tmp_path, pair("single_blocks.0.linear1", 20, 7 * 20))
    assert load_lora(path).sizes()["single_transformer_blocks.0.proj_mlp"][1:] == (20, 80)


def test_one_layer_of_another_width_is_named(tmp_path, one_line):
    tensors = pair("double_blocks.0.img_attn.qkv", 8, 24)
    for layer in [f"double_blocks.{i}.img_attn.proj" for i in range(4)]:
        tensors |= pair(layer)
    path = stored(tmp_path, tensors)
    message = one_line(MappingError, load_lora, path)
    assert "double_blocks.0.img_attn.qkv.lora_A.weight" in message
    assert "expected 16 → 16 like the others" in message
    bundle = load_lora(path, strict=False)
    assert set(bundle.modules) == {f"transformer_blocks.{i}.attn.to_out.0" for i in range(4)}
    assert len(bundle.report.unused) == 2


def test_unknown_base(tmp_path, one_line):
    path = stored(tmp_path, pair("transformer_blocks.0.attn.to_q"))
    assert "choose one of flux, sd3" in one_line(FamilyError, load_lora, path, "sdxl")


@pytest.mark.parametrize(
    ("prefix", "layer", "component", "family"),
    [
        ("lora_te1_", "text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", "flux"),
        ("lora_te_", "text_model_encoder_layers_11_mlp_fc2", "text_encoder", "flux"),
        ("lora_te3_", "encoder_block_2_layer_0_SelfAttention_v", "text_encoder_2", "flux"),
        ("lora_te3_", "encoder_block_2_layer_1_DenseReluDense_wi_0", "text_encoder_3", "sd3"),
        ("lora_te2_", "text_model_encoder_layers_31_mlp_fc1", "text_encoder_2", "sd3"),
        ("text_encoder.", "text_model.encoder.layers.0.self_attn.out_proj", "text_encoder", "flux"),
        ("text_encoder_2.", "encoder.block.0.layer.0.SelfAttention.o", "text_encoder_2", "flux"),
        (
            "text_encoders.t5xxl.transformer.",
            "encoder.block.0.layer.0.SelfAttention.o",
            "text_encoder_2",
            "flux",
        ),
        (
            "text_encoders.clip_g.transformer.",
            "text_model.encoder.layers.0.mlp.fc1",
            "text_encoder_2",
            "sd3",
        ),
    ],
)
def test_text_encoders_are_kept_apart(prefix, layer, component, family, tmp_path):
    tensors = pair("transformer.transformer_blocks.0.attn.to_q") | pair(prefix + layer, 12, 20)
    bundle = load_lora(stored(tmp_path, tensors), family)
    assert list(bundle.modules) == ["transformer_blocks.0.attn.to_q"]
    assert list(bundle.text_encoders) == [component]
    (name,) = bundle.text_encoders[component]
    assert name.replace(".", "_") == layer.replace(".", "_")
    assert bundle.text_encoders[component][name].delta_weight().shape == (20, 12)
    assert {fate.component for fate in bundle.report.fates} == {"transformer", component}


def test_old_processors_of_text_encoders(tmp_path):
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    tensors = {f"{stem}.down.weight": torch.ones(1, 8), f"{stem}.up.weight": torch.ones(8, 1)}
    tensors |= pair("transformer_blocks.0.attn.to_q")
    bundle = load_lora(stored(tmp_path, tensors))
    assert list(bundle.text_encoders["text_encoder"]) == [
        "text_model.encoder.layers.0.self_attn.q_proj"
    ]


def test_report_of_a_lenient_reading(tmp_path):
    tensors = pair("transformer_blocks.0.attn.to_q")
    tensors |= {"transformer_blocks.0.attn.to_q.diff_b": torch.ones(16), "junk": torch.ones(1)}
    path = stored(tmp_path, tensors)
    report = load_lora(path, strict=False).report
    assert {fate.key for fate in report.unused} == {"transformer_blocks.0.attn.to_q.diff_b", "junk"}
    assert all(fate.modules == ("transformer_blocks.0.attn.to_q",) for fate in report.used)
    assert len(report.used) == 2
    with pytest.raises(MappingError) as caught:
        load_lora(path)
    assert caught.value.report == report
    assert str(report.dialects[0]) == "no prefix, diffusers names, lora_A.weight"


def test_values_that_do_nothing_are_listed(tmp_path):
    tensors = pair("transformer_blocks.0.attn.to_q") | pair("transformer_blocks.0.attn.to_k")
    tensors["transformer_blocks.0.attn.to_k.lora_B.weight"].zero_()
    assert load_lora(stored(tmp_path, tensors)).report.zero == ("transformer_blocks.0.attn.to_k",)


def test_negative_alpha_is_used_when_lenient(tmp_path):
    layer = "transformer_blocks.0.attn.to_q"
    path = stored(tmp_path, pair(layer) | {f"{layer}.alpha": torch.tensor(-4.0)})
    assert load_lora(path, strict=False).delta_weight(layer)[0, 0] == -4


def test_layers_without_change(tmp_path, one_line):
    bundle = load_lora(stored(tmp_path, pair("transformer_blocks.0.attn.to_q")))
    assert "does not change the layer x" in one_line(Exception, bundle.delta_weight, "x")


def test_digest_depends_on_the_change_alone(tmp_path):
    layer, k = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
    digests = set()
    for prefix, metadata, dtype in (
        ("transformer.", None, torch.float32),
        ("lora_unet_", {"a": "b"}, torch.bfloat16),
    ):
        name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
        tensors = {key: tensor.to(dtype) for key, tensor in pair(name).items()}
        digests.add(load_lora(stored(tmp_path, tensors, metadata)).digest())
    assert len(digests) == 1
    digests.add(load_lora(stored(tmp_path, pair(k))).digest())
    digests.add(load_lora(stored(tmp_path, pair(layer, rank=2))).digest())
    tensors = pair(layer)
    tensors[f"{layer}.lora_A.weight"][0, 0] = 2
    digests.add(load_lora(stored(tmp_path, tensors)).digest())
    scaled = pair(layer) | {f"{layer}.alpha": torch.tensor(2.0)}
    digests.add(load_lora(stored(tmp_path, scaled)).digest())
    assert len(digests) == 5


def test_hashes_of_files(tmp_path):
    path = stored(tmp_path, pair("transformer_blocks.0.attn.to_q"), {"a": "b"})
    file, content = SafetensorsFile(path), path.read_bytes()
    assert file.content_sha256() == hashlib.sha256(content).hexdigest()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert file.tensors_sha256() == hashlib.sha256(data).hexdigest()


def test_norms(tmp_path, dialects):
    written = dialects.write("bfl", "loha")
    for name, norm in load_lora(written.save(tmp_path / "a.safetensors")).norms().items():
        expected = float(torch.linalg.matrix_norm(torch.from_numpy(written.expected[name])))
        assert norm == pytest.approx(expected, rel=1e-5)


def peft_folder(tmp_path, config, prefix="base_model.model."):
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    tensors = pair(f"{prefix}transformer_blocks.0.attn.to_q", rank=4)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}}, 0.25),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"tn.to_q": 1}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^attn.to_q": 1}}, 2.0),
        (
            {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"^transformer_blocks\.0\.attn.to_q": 1}},
            0.25,
        ),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"to_q": 4}}, 2.0),
        ({"r": 4}, 2.0),
    ],
)
def test_configuration_of_a_folder(config, scale, tmp_path):
    folder = peft_folder(tmp_path, {"peft_type": "LORA", **config})
    for path in (folder, folder / "adapter_model.safetensors"):
        assert load_lora(path).modules["transformer_blocks.0.attn.to_q"].scale == scale
    moved = (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    assert load_lora(folder, config=moved).modules["transformer_blocks.0.attn.to_q"].scale == scale
    assert load_lora(folder).modules["transformer_blocks.0.attn.to_q"].scale == 1.0


def test_missing_or_huge_configuration(tmp_path, one_line):
    folder = peft_folder(tmp_path, {"r": 4})
    assert "cannot be read" in one_line(Exception, load_lora, folder, config=tmp_path / "none.json")
    (folder / "adapter_config.json").write_text(" " * (2**20 + 1))
    assert "larger than the limit" in one_line(Exception, load_lora, folder)


@pytest.mark.parametrize(
    ("kind", "config"), [("LOHA", {"r": 2, "alpha": 6}), ("LOKR", {"r": 2, "alpha": 6})]
)
def test_other_kinds_of_peft(kind, config, tmp_path):
    """PEFT scales LoHa and LoKr by α/r of its configuration, whole factors included."""
    stem = "base_model.model.transformer_blocks.0.attn.to_q."
    if kind == "LOHA":
        tensors = {f"{stem}hada_w{n}_{c}": torch.ones((4, 2) if c == "a" else (2, 4))
                   for n in (1, 2) for c in "ab"}  # fmt: skip
        expected = 3 * 4
    else:
        tensors = {f"{stem}lokr_w1": torch.ones(2, 2), f"{stem}lokr_w2": torch.ones(2, 2)}
        expected = 3
    path = stored(tmp_path, tensors)
    (tmp_path / "a.adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
    assert load_lora(path).delta_weight("transformer_blocks.0.attn.to_q")[0, 0] == expected


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 2, "rank_pattern": {"attn.to_q": 4}, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 1, "attn.to_q": 16}}, 0.25),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_settings_in_the_header(prefix, settings, scale, tmp_path):
    text = json.dumps({f"{prefix}{key}": value for key, value in settings.items()}, indent=2)
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", rank=4)
    bundle = load_lora(stored(tmp_path, tensors, {"lora_adapter_metadata": text}))
    assert bundle.modules["transformer_blocks.0.attn.to_q"].scale == scale


def test_stored_alpha_wins_over_settings(tmp_path):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = pair(layer, rank=4) | {f"{layer}.alpha": torch.tensor(2.0)}
    text = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    bundle = load_lora(stored(tmp_path, tensors, {"lora_adapter_metadata": text}))
    assert bundle.modules["transformer_blocks.0.attn.to_q"].scale == 0.5


@pytest.mark.parametrize("kind", ["loha", "lokr wf", "lokr ww", "lokr fw"])
def test_values_of_products(kind, dialects, tmp_path, one_line):
    written = dialects.write("bfl", kind, layers=2, seed=3)
    names = [name for name in written.tensors if name.endswith(("_a", "_w1", "_w2"))]
    written.tensors[names[0]].zero_()
    path = written.save(tmp_path / "a.safetensors")
    zero = set(load_lora(path).report.zero)
    assert zero
    assert zero == {n for n in written.expected if load_lora(path).modules[n].norm() == 0}
    written.tensors[names[0]].fill_(float("nan"))
    message = one_line(MappingError, load_lora, written.save(path))
    assert sorted(zero)[0] in message


def test_whole_factors_of_the_largest_layers_cost_no_matmul(tmp_path):
    w1, w2 = torch.randn(16, 16), torch.randn(768, 192)
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    bundle = load_lora(stored(tmp_path, {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}))
    name = "transformer_blocks.0.ff.net.0.proj"
    assert bundle.sizes()[name] == (3072, 3072, 12288)
    with FlopCounterMode(display=False) as counter:
        delta = bundle.delta_weight(name)
        norm = bundle.modules[name].norm()
    assert counter.get_total_flops() == 0
    assert torch.equal(delta[768:1536, 192:384], w1[1, 1] * w2)
    expected = torch.linalg.matrix_norm(w1.double()) * torch.linalg.matrix_norm(w2.double())
    assert norm == pytest.approx(float(expected), rel=1e-5)


TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
}
CASES = {
    "flux": (
        "FluxTransformer2DModel",
        {**TINY, "num_single_layers": 3, "axes_dims_rope": (4, 6, 6)},
    ),
    "guided": ("FluxTransformer2DModel", {**TINY, "guidance_embeds": True, "in_channels": 48}),
    "control": ("FluxTransformer2DModel", {**TINY, "in_channels": 384, "out_channels": 64}),
    "sd3": ("SD3Transformer2DModel", {**TINY, "caption_projection_dim": 32}),
    "sd3.5": (
        "SD3Transformer2DModel",
        {**TINY, "caption_projection_dim": 32, "dual_attention_layers": (0,), "patch_size": 1},
    ),
}


def linears(model):
    found = model.named_modules()
    return {n: (m.in_features, m.out_features) for n, m in found if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("name", CASES)
def test_layers_are_those_of_diffusers(name, tmp_path):
    import diffusers

    kind, options = CASES[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**options)
    model.save_config(tmp_path / "transformer")
    expected = linears(model)
    assert (modules_in(tmp_path), modules_in(tmp_path / "transformer")) == (expected, expected)
    assert len(expected) > 20


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FamilyError, "holds no model of diffusers"),
        ("[]", ContainerError, "is a JSON list, expected an object"),
        ('{"_class_name": "UNet"}', FamilyError, "is of class 'UNet', expected FluxTransformer"),
        ('{"_class_name": "SD3Transformer2DModel"}', FamilyError, "num_layers is None, expected"),
        (
            json.dumps({"_class_name": "FluxTransformer2DModel", **TINY, "num_layers": True}),
            FamilyError,
            "num_layers is True, expected a positive integer",
        ),
        (" " * 2**21, FamilyError, "is larger than the limit"),
    ],
    ids=range(6),
)
def test_damaged_configurations(content, error, words, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=words):
        modules_in(tmp_path)


SDXL = {  # names of trainers, of layers that do not attend to text, or do
    "LoCon": "lora_unet_input_blocks_8_0_in_layers_2.lora_down.weight",
    "LoCon of diffusers": "lycoris_down_blocks_2_resnets_1_conv1.lora_down.weight",
    "PEFT": "base_model.model.down_blocks.2.attentions.0.transformer_blocks.7.attn1.to_q.lora_A."
    "weight",
    "processors": "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down."
    "weight",
    "PEFT, text": "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A."
    "weight",
}


@pytest.mark.fault("46 D5")
@pytest.mark.parametrize("trainer", SDXL)
def test_sdxl_is_recognized_whoever_wrote_it(trainer):
    assert recognize({SDXL[trainer]: (4, 2048)}, {}, []) == ("sdxl", "names of tensors")


@pytest.mark.fault("46 D5")
def test_other_unets_are_not_taken_for_sdxl_and_metadata_decide():
    deep = {f"lora_unet_input_blocks_{n}_0_in_layers_2.lora_down.weight": (4, 640) for n in (8, 10)}
    assert recognize(deep, {}, [])[0] == "unet"
    assert (
        recognize({"lora_unet_up_blocks_3_resnets_0_conv1.lora_down.weight": (4, 9)}, {}, [])[0]
        == "unet"
    )
    assert recognize({SDXL["PEFT, text"]: (4, 768)}, {}, [])[0] == "sd1"
    assert recognize(deep, {"ss_base_model_version": "sdxl_base_v1-0"}, []) == ("sdxl", "metadata")
