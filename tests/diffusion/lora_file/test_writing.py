"""Written in every format and read again: the same ΔW, or a refusal that names the layers."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from core_gates.errors import GatesError
from diffusion.lora_file import (
    Factors,
    FormatError,
    LoraBundle,
    load_lora,
    save_lora,
    shrink_bundle,
)
from diffusion.lora_file.writing import FORMATS as FORMATTERS
from diffusion.lora_file.writing import text_encoders

SINGLE_FILES = ("diffusers", "kohya", "comfyui")
FORMATS = (*SINGLE_FILES, "peft")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
Q, K, V = (f"transformer_blocks.0.attn.to_{c}" for c in "qkv")


def draw(outputs=16, rank=2, inputs=16, scale=1.0, magnitude=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank)
    return Factors(down, up, scale, magnitude)


def place(folder, format):
    return folder / ("out" if format == "peft" else "out.safetensors")


def same(found, expected, base=None):
    """Compare every ΔW by its norm; DoRA refers to the weights of a base."""
    assert set(found.modules) == set(expected.modules)
    for name in expected.modules:
        weight = None if base is None else base[name].float()
        one, two = (bundle.delta_weight(name, weight) for bundle in (found, expected))
        assert torch.linalg.matrix_norm(one - two) <= 1e-6 * torch.linalg.matrix_norm(two)


NAMES = (
    "bfl", "diffsynth", "diffusers_flux", "native_sd3", "diffusers_sd3", "xlabs",
    "processors_flux", "processors_sd3",
)  # fmt: skip
PAIRS = [
    pytest.param(names, format, marks=[pytest.mark.slow] * ((place + number) % len(FORMATTERS) > 1))
    for place, names in enumerate(NAMES)
    for number, format in enumerate(FORMATTERS)
]


@pytest.mark.parametrize(("names", "format"), PAIRS)
def test_round_trip_or_a_refusal_that_names_a_layer(names, format, dialects, tmp_path, one_line):
    out = place(tmp_path, format)
    for kind in dialects.kinds_of(names):
        written = dialects.write(names, kind)
        base = dialects.base_of(written.family)
        bundle = load_lora(written.save(tmp_path / "in.safetensors"), base)
        if kind == "dora columns" or (format, written.family) == ("bfl", "sd3"):
            message = one_line(FormatError, save_lora, bundle, out, format)
            assert any(module in message for module in written.expected)
            continue
        again = load_lora(save_lora(bundle, out, format), base)
        same(again, bundle, written.base)
        assert (again.family, again.report.unused) == (bundle.family, ())


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_content_gives_the_same_bytes(format, dialects, tmp_path):
    written = dialects.write("bfl", "lora_down")
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        metadata = {"z": "1", "a": "2", "ss_tag_frequency": '{"a": 1}'}
        bundle = load_lora(written.save(tmp_path / name / "in.safetensors", metadata))
        out = save_lora(bundle, place(tmp_path / name, format), format)
        files = sorted(out.iterdir()) if out.is_dir() else [out]
        digests.add(hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("format", SINGLE_FILES)
def test_other_libraries_read_the_file(format, dialects, tmp_path):
    written = dialects.write("bfl", "lora_down")
    bundle = load_lora(written.save(tmp_path / "in.safetensors", {"modelspec.title": "x"}))
    out = save_lora(bundle, tmp_path / "out.safetensors", format)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out).values())
    with safe_open(out, "pt") as file:
        assert (file.metadata()["format"], file.metadata()["modelspec.title"]) == ("pt", "x")


def test_names_of_each_format(dialects, tmp_path):
    bundle = load_lora(dialects.write("bfl", "lora_A").save(tmp_path / "in.safetensors"))
    bundle = LoraBundle("flux", dict(bundle.modules), {"text_encoder": {TEXT: draw()}})
    kohya = load_file(save_lora(bundle, tmp_path / "k.safetensors", "kohya"))
    stems = {layer.name.replace(".", "_") for layer in dialects.NAMES["bfl"][1]}
    expected = {f"lora_unet_{stem}" for stem in stems} | {f"lora_te1_{TEXT.replace('.', '_')}"}
    assert {name.partition(".")[0] for name in kohya} == expected
    assert {name.partition(".")[2] for name in kohya} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    assert kohya[f"{qkv}.lora_up.weight"].shape[0] == 48
    comfyui = load_file(save_lora(bundle, tmp_path / "c.safetensors", "comfyui"))
    assert "diffusion_model.single_blocks.0.linear1.lora_A.weight" in comfyui
    assert f"text_encoders.clip_l.transformer.{TEXT}.lora_B.weight" in comfyui
    diffusers = load_file(save_lora(bundle, tmp_path / "d.safetensors", "diffusers"))
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in diffusers
    assert f"text_encoder.{TEXT}.lora_B.weight" in diffusers
    assert not any("alpha" in name for name in diffusers)


@pytest.mark.parametrize("kind", ["lora_down", "loha", "dora rows", "tucker"])
def test_plain_names_have_the_scale_in_b(kind, dialects, tmp_path):
    written = dialects.write("bfl", kind)
    bundle = load_lora(written.save(tmp_path / "in.safetensors"))
    tensors = load_file(save_lora(bundle, tmp_path / "out.safetensors", "bfl"))
    assert not any("alpha" in name for name in tensors)
    assert all(name.startswith(("double", "single", "img", "txt", "time", "vector", "guidance",
                                "final")) for name in tensors)  # fmt: skip
    same(load_lora(tmp_path / "out.safetensors"), bundle, written.base)


@pytest.mark.parametrize(
    ("family", "encoders", "words"),
    [("sd3", {}, f"{Q}: it has names for the layers of FLUX.1 alone"),
     ("flux", {"text_encoder": {TEXT: draw()}}, f"text_encoder.{TEXT}: it has no name for them")],
)  # fmt: skip
def test_plain_names_are_those_of_flux(family, encoders, words, tmp_path, one_line):
    bundle = LoraBundle(family, {Q: draw()}, encoders)
    assert words in one_line(FormatError, save_lora, bundle, tmp_path / "a.safetensors", "bfl")


def test_which_text_encoders_a_format_holds():
    every = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    for format in ("diffusers", "peft", "kohya", "bfl", "comfyui"):
        for family in ("flux", "sd3"):
            held = text_encoders(format, family)
            for encoder in every:
                bundle = LoraBundle(family, {Q: draw()}, {encoder: {TEXT: draw()}})
                try:
                    FORMATTERS[format](bundle)
                except FormatError:
                    assert encoder not in held
                else:
                    assert encoder in held


def test_halves_of_the_last_layer_are_exchanged(tmp_path):
    bundle = LoraBundle("flux", {"norm_out.linear": draw(32)})
    kohya = load_file(save_lora(bundle, tmp_path / "k.safetensors", "kohya"))
    up = kohya["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(up, bundle.modules["norm_out.linear"].up.roll(16, 0))


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_some_parts_of_a_fused_layer(format, tmp_path):
    modules = {Q: draw(seed=1, scale=0.5), V: draw(rank=3, seed=2, scale=2.0)}
    bundle = LoraBundle("flux", modules | {"transformer_blocks.0.norm1.linear": draw(96)})
    again = load_lora(save_lora(bundle, tmp_path / "a.safetensors", format))
    same(again, bundle)
    assert (again.ranks()[Q], again.ranks()[V]) == (2, 3)


def test_peft_configuration(tmp_path):
    modules = {Q: draw(), K: draw(rank=4, scale=0.5), "proj_out": draw(48)}
    out = save_lora(LoraBundle("flux", modules), tmp_path / "out", "peft")
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], (config["r"], config["lora_alpha"])) == ("LORA", (2, 2))
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({K: 4}, {})
    assert config["target_modules"] == rf"proj_out|{K}|{Q}".replace(".", r"\.")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(format, dtype, tmp_path):
    bundle = LoraBundle("flux", {Q: draw()})
    again = load_lora(save_lora(bundle, place(tmp_path, format), format, dtype))
    assert again.storage == getattr(torch, dtype)
    delta = bundle.delta_weight(Q)
    error = torch.linalg.matrix_norm(again.delta_weight(Q) - delta) / torch.linalg.matrix_norm(
        delta
    )
    assert error <= {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    assert (error == 0) == (dtype == "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_stored_precision_is_kept_where_it_is_exact(dtype, dialects, tmp_path):
    written = dialects.write("bfl", "lora_down", dtype=dtype)
    bundle = load_lora(written.save(tmp_path / "in.safetensors"))
    for format in FORMATS:
        again = load_lora(save_lora(bundle, place(tmp_path, format), format))
        assert again.storage == (dtype if dtype.itemsize == 2 else torch.bfloat16)
        same(again, bundle)


@pytest.mark.parametrize("format", FORMATS)
def test_stored_precision_is_given_up_where_values_would_change(format, dialects, tmp_path):
    written = dialects.write("bfl", "lora_down", dtype=torch.bfloat16)
    bundle, _ = shrink_bundle(load_lora(written.save(tmp_path / "in.safetensors")), rank=1)
    assert bundle.storage == torch.bfloat16
    same(load_lora(save_lora(bundle, place(tmp_path, format), format)), bundle)


def test_values_too_large_for_the_dtype(tmp_path):
    bundle = LoraBundle("flux", {Q: Factors(torch.full((1, 4), 1e6), torch.ones(4, 1))})
    with pytest.raises(FormatError, match=r"too large for torch\.float16"):
        save_lora(bundle, tmp_path / "a.safetensors", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "encoder", "family", "words"),
    [
        ("peft", "text_encoder", "flux", f"text_encoder.{TEXT}: a folder of PEFT"),
        ("diffusers", "text_encoder_2", "flux", f"text_encoder_2.{TEXT}: diffusers reads"),
        ("diffusers", "text_encoder_3", "sd3", f"text_encoder_3.{TEXT}: diffusers reads"),
        ("kohya", "text_encoder_3", "flux", f"text_encoder_3.{TEXT}: it has no name"),
    ],
)
def test_refusals_name_the_layers(format, encoder, family, words, tmp_path, one_line):
    bundle = LoraBundle(family, {Q: draw()}, {encoder: {TEXT: draw()}})
    assert words in one_line(FormatError, save_lora, bundle, place(tmp_path, format), format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_dora_of_some_layers(format, tmp_path, one_line):
    bundle = LoraBundle("flux", {Q: draw(magnitude=torch.ones(16, 1)), K: draw(), V: draw()})
    message = one_line(FormatError, save_lora, bundle, place(tmp_path, format), format)
    assert K in message
    assert V in message


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_dora_of_columns(format, tmp_path, one_line):
    bundle = LoraBundle("flux", {Q: draw(magnitude=torch.ones(1, 16))})
    assert Q in one_line(FormatError, save_lora, bundle, place(tmp_path, format), format)


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        (
            "a.safetensors",
            {"format": "lycoris"},
            "choose one of diffusers, peft, kohya, bfl, comfyui",
        ),
        ("a.safetensors", {"dtype": "int8"}, "choose one of float32"),
        ("a.bin", {}, "must end with .safetensors"),
        ("file/a.safetensors", {}, "cannot be written"),
    ],
)
def test_bad_calls(path, options, words, tmp_path, one_line):
    (tmp_path / "file").touch()
    bundle = LoraBundle("flux", {Q: draw()})
    assert words in one_line(GatesError, save_lora, bundle, tmp_path / path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_to_write(tmp_path, one_line):
    for format in FORMATS:
        out = place(tmp_path, format)
        assert "nothing to write" in one_line(
            FormatError, save_lora, LoraBundle("flux", {}), out, format
        )
    nan = LoraBundle("flux", {Q: Factors(torch.full((1, 4), float("nan")), torch.ones(4, 1))})
    assert "NaN" in one_line(FormatError, save_lora, nan, tmp_path / "a.safetensors")


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
@pytest.mark.parametrize(
    ("family", "encoders"),
    [("flux", ("", "_2")), ("sd3", ("", "_2", "_3"))],
)
def test_text_encoders_are_kept(format, family, encoders, tmp_path):
    t5 = "encoder.block.3.layer.0.SelfAttention.q"
    texts = {
        f"text_encoder{number}": {t5 if number == encoders[-1] else TEXT: draw(seed=n)}
        for n, number in enumerate(encoders)
    }
    bundle = LoraBundle(family, {Q: draw()}, texts)
    again = load_lora(save_lora(bundle, tmp_path / "a.safetensors", format), family)
    assert set(again.text_encoders) == set(texts)
    for encoder, modules in texts.items():
        for name, factors in modules.items():
            found = again.text_encoders[encoder][name]
            torch.testing.assert_close(found.delta_weight(), factors.delta_weight())


@pytest.mark.parametrize("format", FORMATS)
def test_ranks_that_no_reader_takes(format, tmp_path, one_line):
    high = LoraBundle("flux", {Q: draw(rank=1025)})
    message = one_line(FormatError, save_lora, high, place(tmp_path, format), format)
    assert f"rank 1025 of {Q} is above 1024; shrink" in message
    parts = LoraBundle("flux", {name: draw(rank=400, seed=n) for n, name in enumerate((Q, K, V))})
    if format in ("kohya", "comfyui"):
        message = one_line(FormatError, save_lora, parts, place(tmp_path, format), format)
        assert "rank 1200 of" in message
    else:
        same(load_lora(save_lora(parts, place(tmp_path, format), format)), parts)
    high, _ = shrink_bundle(high, rank=16)
    same(load_lora(save_lora(high, tmp_path / "b.safetensors")), high)
