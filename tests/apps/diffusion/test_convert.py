"""What ``gates diffusion convert`` writes, read again."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apps.main import main
from diffusion.lora_file import load_lora

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def place(format):
    return "out" if format == "peft" else "out.safetensors"


@pytest.fixture
def refusal(samples, capsys):
    """Return the line with which a command is refused."""

    def run(*words):
        assert main(["diffusion", "convert", *map(str, words)]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "bfl", "comfyui"])
@pytest.mark.parametrize(
    "name", ["kohya_flux_full", "peft_raw_rslora", "lycoris_loha", "kohya_sd3", "xlabs"]
)
def test_every_format_keeps_the_change(name, format, gates, refusal, samples, expected, worst):
    source, output = samples / f"{name}.safetensors", place(format)
    if (name, format) == ("kohya_sd3", "bfl"):
        assert "names for the layers of FLUX.1 alone" in refusal(source, output, "--to", format)
        return
    printed = gates("convert", source, output, "--to", format)
    assert printed.splitlines()[-1] == output
    assert f"written as {format}: " in printed
    assert worst(load_lora(output), expected(name)) <= 1e-5


def test_metadata_are_kept_and_what_is_outdated_is_not(gates, samples):
    gates("convert", samples / "kohya_flux_full.safetensors", "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == "demo style"
    assert "sshs_model_hash" not in metadata


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_lower_rank_and_its_error(format, gates, samples, expected):
    source = samples / "kohya_flux_full.safetensors"
    printed = gates("convert", source, "out.safetensors", "--to", format, "--rank", 1)
    bundle, deltas = load_lora("out.safetensors"), expected("kohya_flux_full")
    assert set(bundle.ranks().values()) == {1}
    own = [name for name in deltas if name.startswith("single_transformer_blocks.0.")]
    lost = sum(
        np.linalg.norm(bundle.delta_weight(name).double().numpy() - deltas[name]) ** 2
        for name in own
    )
    error = (lost / sum(np.linalg.norm(deltas[name]) ** 2 for name in own)) ** 0.5
    assert f"{error:.2e}" in printed
    assert 0.5 < error < 1


def test_fused_layers_are_not_larger_than_the_rank(gates, samples):
    source = samples / "bfl_plain.safetensors"
    gates("convert", source, "out.safetensors", "--to", "comfyui", "--rank", 2)
    tensors = load_file("out.safetensors")
    downs = [tensor for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    assert (len(downs), {down.shape[0] for down in downs}) == (4, {2})


def test_energy_chooses_ranks(gates, samples, expected):
    gates("convert", samples / "kohya_flux_full.safetensors", "out.safetensors", "--energy", 0.8)
    bundle, deltas = load_lora("out.safetensors"), expected("kohya_flux_full")
    for name, delta in deltas.items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        enough = int((np.cumsum(squares) >= 0.8 * squares.sum()).argmax()) + 1
        assert bundle.ranks()[name] == enough
    assert len(set(bundle.ranks().values())) > 1


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 1e-2), ("fp16", 2e-3), ("fp32", 1e-5)])
def test_numbers(dtype, bound, gates, samples, expected, worst):
    gates("convert", samples / "xlabs.safetensors", "out.safetensors", "--dtype", dtype)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert {t.dtype for t in load_file("out.safetensors").values()} == {kinds[dtype]}
    error = worst(load_lora("out.safetensors"), expected("xlabs"))
    assert error <= bound
    assert (error > 1e-5) == (dtype != "fp32")


def with_text(samples, number=2):
    """A sample with parts for text encoders."""
    tensors = load_file(samples / "kohya_flux_full.safetensors")
    for encoder in range(1, number + 1):
        layer = f"lora_te{encoder}_{TEXT.replace('.', '_')}"
        tensors |= {
            f"{layer}.lora_down.weight": torch.randn(2, 8),
            f"{layer}.lora_up.weight": torch.randn(8, 2),
            f"{layer}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, "in.safetensors")


def test_parts_for_text_encoders_are_kept_where_the_format_holds_them(gates, refusal, samples):
    with_text(samples)
    before = load_lora("in.safetensors")
    assert set(before.text_encoders) == {"text_encoder", "text_encoder_2"}
    for format in ("kohya", "comfyui"):
        printed = gates("convert", "in.safetensors", f"{format}.safetensors", "--to", format)
        assert "1 of text_encoder, 1 of text_encoder_2" in printed
        again = load_lora(f"{format}.safetensors")
        for name, modules in before.text_encoders.items():
            one, two = modules[TEXT], again.text_encoders[name][TEXT]
            torch.testing.assert_close(one.delta_weight(), two.delta_weight())
    line = refusal("in.safetensors", "a.safetensors", "--to", "diffusers")
    assert "diffusers cannot hold 1 layers of text_encoder_2" in line
    assert "--lenient" in line
    printed = gates("convert", "in.safetensors", "a.safetensors", "--lenient")
    assert "left out: 1 layers of text_encoder_2: diffusers cannot hold them" in printed
    assert set(load_lora("a.safetensors").text_encoders) == {"text_encoder"}
    assert "peft cannot hold 1 layers of text_encoder" in refusal(
        "in.safetensors", "p", "--to=peft"
    )


def test_what_cannot_be_used_is_an_error_or_listed(gates, refusal, samples):
    tensors = load_file(samples / "xlabs.safetensors") | {"strange.thing": torch.ones(3)}
    save_file(tensors, "in.safetensors")
    assert "strange.thing: its name ends with no known factor" in refusal(
        "in.safetensors", "a.safetensors"
    )
    printed = gates("convert", "in.safetensors", "a.safetensors", "--lenient")
    assert "left out: strange.thing" in printed
    assert "used: 8 of 9 tensors, for 8 layers" in printed


def flux(folder, width=16):
    """A folder of diffusers with a configuration alone."""
    (folder / "transformer").mkdir(parents=True)
    config = {
        "_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": width, "in_channels": 48,
        "joint_attention_dim": 24, "pooled_projection_dim": 8, "patch_size": 1,
    }  # fmt: skip
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


def test_the_layers_of_a_base_must_be_met(gates, refusal, samples, tmp_path, expected, worst):
    source = samples / "bfl_plain.safetensors"
    gates("convert", source, "a.safetensors", "--base", flux(tmp_path / "fits"))
    assert worst(load_lora("a.safetensors"), expected("bfl_plain")) <= 1e-5
    line = refusal(source, "b.safetensors", "--base", flux(tmp_path / "wide", 32))
    assert "it changes a layer of 16 → 48 features, expected 32 → 32 + 32 + 32" in line
    assert not (tmp_path / "b.safetensors").exists()


def test_an_output_is_replaced_only_if_asked_for(gates, refusal, samples, tmp_path):
    source = samples / "xlabs.safetensors"
    (tmp_path / "out.safetensors").write_text("mine")
    assert "--overwrite_output" in refusal(source, "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    gates("convert", source, "out.safetensors", "--overwrite_output")
    assert len(load_lora("out.safetensors").modules) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "samples"]


def test_a_folder_with_other_files_is_never_replaced(gates, refusal, samples, tmp_path):
    source = samples / "xlabs.safetensors"
    gates("convert", source, "peft", "--to", "peft")
    gates("convert", source, "peft", "--to", "peft", "--overwrite_output", "--rank", 1)
    assert set(load_lora("peft").ranks().values()) == {1}
    (tmp_path / "peft" / "note.txt").write_text("mine")
    line = refusal(source, "peft", "--to", "peft", "--overwrite_output")
    assert "a folder with note.txt in it" in line
    (tmp_path / "folder.safetensors").mkdir()
    line = refusal(source, "folder.safetensors", "--overwrite_output")
    assert "a folder and diffusers is a file" in line
    assert (tmp_path / "folder.safetensors").is_dir()
