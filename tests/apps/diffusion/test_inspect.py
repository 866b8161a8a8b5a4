"""What ``gates diffusion inspect`` finds in files of known content."""

import hashlib
import json
import math
import shlex
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.library import LoraLibrary
from diffusion.lora_file import load_lora, verdicts

SAMPLES = {
    "bfl_plain": "nothing",
    "diffusers_peft_metadata": "whole",
    "kohya_flux_full": "part",
    "kohya_sd3": "nothing",
    "lycoris_loha": "nothing",
    "old_attn_processor": "whole",
    "peft_raw_rslora": "error",
    "xlabs": "whole",
}
Q = "transformer.transformer_blocks.0.attn.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@pytest.fixture
def inspect(gates, tmp_path):
    """Return what is written as JSON, one entry per file, and what is printed."""

    def run(*words):
        printed = gates("inspect", *words, "--json", "found.json", "--overwrite_output")
        return json.loads((tmp_path / "found.json").read_text())["files"], printed

    return run


def plain(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{Q}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"{Q}.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    return {**tensors, **changes}


def test_every_sample_has_its_effect_and_its_norms(inspect, samples, expected):
    found, printed = inspect(samples)
    named = {entry["file"].removesuffix(".safetensors"): entry for entry in found}
    assert {name: entry["answer"]["effect"] for name, entry in named.items()} == SAMPLES
    for name, entry in named.items():
        norms = {layer: np.linalg.norm(delta) for layer, delta in expected(name).items()}
        assert set(entry["layers"]) == set(norms)
        for layer, norm in norms.items():
            assert entry["layers"][layer]["norm"] == pytest.approx(norm, rel=1e-5)
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        assert entry["norm"] == pytest.approx(total, rel=1e-5)
        blocks = math.sqrt(sum(norm**2 for norm in entry["norms"].values()))
        assert blocks == pytest.approx(total, rel=1e-5)
        assert f"│ {name} " in printed
    assert printed.count("changes no layer and reports no error") == 2
    assert "bfl_plain.safetensors and 1 more: diffusers" in printed  # that of LyCORIS


@pytest.mark.fault("diffusion D11")
def test_names_are_whole_at_80_columns(gates, samples, monkeypatch):
    wide = gates("inspect", samples)
    assert "AutoV3" in wide
    assert "no room" not in wide
    monkeypatch.setenv("COLUMNS", "80")
    long = "a_drawing_of_a_fox_in_the_style_of_the_demo"
    (samples / "xlabs.safetensors").rename(samples / f"{long}.safetensors")
    printed = gates("inspect", samples)
    table = [line for line in printed.splitlines() if line.startswith("│")]
    assert max(map(len, table)) <= 80
    names = [line.strip("│ ").split("│")[0].strip() for line in table]
    assert sorted(names) == sorted({*SAMPLES, long} - {"xlabs"})
    assert all(effect in line for name, effect in SAMPLES.items() for line in table if name in line)
    assert "no room for AutoV3, triggers" in printed


@pytest.mark.fault("diffusion D11")
def test_links_that_lead_out_of_a_folder_are_not_followed(inspect, samples, tmp_path):
    (samples / "folder").mkdir()
    outside = tmp_path / "outside.safetensors"
    (samples / "xlabs.safetensors").rename(outside)
    (samples / "xlabs.safetensors").symlink_to(outside)
    (samples / "peft").mkdir()
    (samples / "peft" / "adapter_model.safetensors").symlink_to(outside)
    (samples / "folder" / "inside.safetensors").symlink_to(samples / "bfl_plain.safetensors")
    found, printed = inspect(samples)
    refused = {entry["path"]: entry["refused"] for entry in found if entry["refused"]}
    assert set(refused) == {str(samples / "xlabs.safetensors"), str(samples / "peft")}
    assert all("leads out of" in reason for reason in refused.values())
    assert printed.count("leads out of") == 2
    (entry,), _ = inspect(samples / "xlabs.safetensors")  # where it is named, it is meant
    assert entry["refused"] is None


def test_hashes_are_those_of_file_and_tensors(inspect, samples):
    (entry,), printed = inspect(samples / "kohya_flux_full.safetensors")
    raw = (samples / "kohya_flux_full.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    whole, tensors = hashlib.sha256(raw), hashlib.sha256(raw[8 + length :])
    assert (entry["sha256"], entry["auto_v2"]) == (whole.hexdigest(), whole.hexdigest()[:10])
    assert entry["auto_v3"] == tensors.hexdigest()[:12]
    assert entry["auto_v2"] in printed
    assert entry["auto_v3"] in printed
    (entry,), printed = inspect(samples / "kohya_flux_full.safetensors", "--hashes", "false")
    assert entry["sha256"] is entry["auto_v2"] is entry["auto_v3"] is None


def test_one_file_is_shown_with_its_blocks(gates, samples):
    printed = gates("inspect", samples / "kohya_flux_full.safetensors")
    for words in (
        "lora_unet_, bfl names with underscores",
        "2 to 4",
        "'demo style'",
        "none stated",
    ):
        assert words in printed
    assert len([line for line in printed.splitlines() if "transformer_blocks.0" in line]) == 2
    assert "diffusers 0.42.1 applies a part of it" in printed
    layers = gates("inspect", samples / "kohya_flux_full.safetensors", "--layers")
    assert "transformer_blocks.0.norm1_context.linear" in layers
    assert "16 → 96" in layers


@pytest.mark.parametrize("name", [name for name, effect in SAMPLES.items() if effect != "whole"])
def test_the_fix_is_a_command_that_helps(name, inspect, gates, samples, expected, worst):
    (entry,), printed = inspect(samples / f"{name}.safetensors")
    fix = entry["answer"]["fix"]
    assert f"fix: {fix}" in printed
    words = fix.split()
    assert words[:3] == ["gates", "diffusion", "convert"]
    gates(*words[2:])
    bundle = load_lora(samples / f"{name}.diffusers.safetensors")
    assert [verdict.effect for verdict in verdicts(bundle.report)] == ["whole"]
    assert worst(bundle, expected(name)) <= 1e-5
    (entry,), _ = inspect(samples / f"{name}.diffusers.safetensors")
    assert entry["answer"]["fix"] == ""


def test_triggers_are_named_where_the_file_is_applied(inspect, samples):
    save_file(plain(), "a.safetensors", {"modelspec.trigger_phrase": "sks, in oil"})
    (entry,), printed = inspect("a.safetensors")
    assert entry["answer"]["effect"] == "whole"
    assert "its prompt needs 'sks', 'in oil'" in printed


@pytest.mark.parametrize(
    ("tensors", "effect", "words"),
    [
        (plain(**{f"{Q}.lora_B.weight": torch.zeros(16, 2)}), "zero", "every layer is zero"),
        (plain(**{f"{Q}.lora_B.weight": torch.full((16, 2), math.nan)}), "broken", "NaN"),
        (
            plain(
                **{
                    f"text_encoder.{TEXT}.lora_A.weight": torch.full((2, 8), math.nan),
                    f"text_encoder.{TEXT}.lora_B.weight": torch.ones(8, 2),
                }
            ),
            "broken",
            "NaN",
        ),
        (plain(**{f"{Q}.lora_B.weight": torch.full((16, 2), 3e38)}), "broken", "beyond float32"),
        (
            {f"{Q}.{end}": torch.full((16, 16), 1e38) for end in HADAMARD},
            "broken",
            "beyond float32",
        ),
        (
            {
                f"text_encoder.{TEXT}.lora_{end}.weight": t
                for end, t in (("A", torch.ones(2, 8)), ("B", torch.ones(8, 2)))
            },
            "text",
            "text_encoder alone",
        ),
        (
            {f"blocks.0.self_attn.q.lora_{end}.weight": torch.ones(4, 4) for end in "AB"},
            "family",
            "adapter for wan",
        ),
        (
            {f"blocks.0.self_attn.q.lora_{end}.weight": torch.zeros(4, 4) for end in "AB"},
            "zero",
            "every layer is zero",
        ),
    ],
    ids=[
        "zero",
        "NaN",
        "NaN for a text encoder",
        "beyond float32",
        "beyond its square",
        "text encoder",
        "other family",
        "other family, zero",
    ],
)
def test_why_it_does_nothing(tensors, effect, words, inspect, gates, samples):
    save_file(tensors, "a.safetensors")
    (entry,), printed = inspect("a.safetensors")
    assert entry["answer"]["effect"] == effect
    assert words in entry["answer"]["text"]
    assert words in " ".join(printed.split())
    assert entry["answer"]["fix"] == ""
    if effect == "broken":
        gates("index", ".", "--no_encode")
        with LoraLibrary(".") as library:
            assert "nonfinite" in library.find("a").flags


def test_what_is_odd_is_listed(inspect, samples):
    tensors = load_file(samples / "xlabs.safetensors")
    tensors |= {"strange.thing": torch.ones(3)}
    save_file(tensors, "a.safetensors", {"sshs_model_hash": "0" * 64})
    (entry,), printed = inspect("a.safetensors")
    assert entry["left_out"] == {"strange.thing": "its name ends with no known factor"}
    assert any("changed after training" in odd for odd in entry["odd"])
    assert "left out: strange.thing" in printed
    tensors = load_file(samples / "kohya_sd3.safetensors")
    alpha = next(name for name in tensors if name.endswith("alpha"))
    save_file(tensors | {alpha: torch.tensor(-1.0)}, "b.safetensors")
    (entry,), printed = inspect("b.safetensors")
    assert any("α is -1" in odd for odd in entry["odd"])
    assert "α is -1" in printed


def test_control_characters_and_markup_stay_out(inspect, samples):
    title = "\x1b[31mred\x1b[0m [bold]b[/bold] :smile: \u202etxt\nnext"
    save_file(plain(), "a.safetensors", {"modelspec.title": title, "ss_tag_frequency": "{broken"})
    (entry,), printed = inspect("a.safetensors")
    assert entry["title"] == "[31mred[0m [bold]b[/bold] :smile: txt next"
    assert "[bold]b[/bold] :smile:" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def test_a_folder_shows_what_it_can(inspect, samples):
    (samples / "broken.safetensors").write_bytes(b"\xff" * 64)
    (samples / "old.ckpt").write_bytes(b"PK\x03\x04")
    (samples / "deep" / "peft").mkdir(parents=True)
    for end, name in (("safetensors", "adapter_model"), ("adapter_config.json", "adapter_config")):
        target = samples / "deep" / "peft" / f"{name}.{end.rpartition('.')[2]}"
        target.write_bytes((samples / f"peft_raw_rslora.{end}").read_bytes())
    found, printed = inspect(samples)
    refused = {entry["path"]: entry["refused"] for entry in found if entry["refused"]}
    assert {path.rpartition("/")[2] for path in refused} == {"broken.safetensors", "old.ckpt"}
    assert "header" in refused[str(samples / "broken.safetensors")]
    assert "pickle" in refused[str(samples / "old.ckpt")]
    assert printed.count("refused") == 2
    (peft,) = [entry for entry in found if entry["path"] == str(samples / "deep" / "peft")]
    (twin,) = [e for e in found if not e["refused"] and e["file"] == "peft_raw_rslora.safetensors"]
    assert peft["norm"] == twin["norm"]


def test_text_encoders_that_diffusers_does_not_read_are_named(inspect, samples):
    text = {
        f"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_{end}.weight": tensor
        for end, tensor in (("A", torch.ones(2, 8)), ("B", torch.ones(8, 2)))
    }
    save_file(plain(**text), "a.safetensors")
    (entry,), _ = inspect("a.safetensors")
    assert entry["answer"]["text"] == (
        "diffusers 0.42.1 applies all layers of the transformer; it reads no adapters of "
        "text_encoder_2"
    )


def test_names_of_files_are_text_of_unknown_origin(inspect, samples, tmp_path):
    name = "a\x1b[31m[red]\n.safetensors"
    (tmp_path / "loras").mkdir()
    (samples / "bfl_plain.safetensors").rename(tmp_path / "loras" / name)
    for _ in range(2):
        _, printed = inspect("loras")
        assert "[31m[red]" in printed
        assert "\x1b" not in printed
        (tmp_path / "loras" / f"b{name}").write_text("broken")
    assert printed.count("refused") == 1


def test_files_that_are_called_alike_are_told_apart(gates, samples, tmp_path, monkeypatch):
    for name in ("bfl_plain", "xlabs"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        file = tmp_path / "mine" / name / "pytorch_lora_weights.safetensors"
        (samples / f"{name}.safetensors").rename(file)
    monkeypatch.setenv("COLUMNS", "100")
    printed = gates("inspect", "mine")
    assert "bfl_plain/pytorch_lora_weights.safetensors: diffusers" in printed
    assert "…" not in printed
    assert [line for line in printed.splitlines() if line.startswith("│ xlabs/pytorch_")]
    assert "inspecting  0" in printed


def test_the_fix_of_a_folder_of_peft(inspect, gates, samples, tmp_path, expected, worst):
    (tmp_path / "my peft").mkdir()
    for end, name in (("safetensors", "adapter_model"), ("adapter_config.json", "adapter_config")):
        source = samples / f"peft_raw_rslora.{end}"
        source.rename(tmp_path / "my peft" / f"{name}.{end.rpartition('.')[2]}")
    (entry,), _ = inspect("my peft")
    words = shlex.split(entry["answer"]["fix"])
    assert words[3:5] == ["my peft", "my peft.diffusers.safetensors"]
    gates(*words[2:])
    assert worst(load_lora("my peft.diffusers.safetensors"), expected("peft_raw_rslora")) <= 1e-5


@pytest.mark.fault("46 D5")
def test_a_folder_names_a_family_that_cannot_be_used_once(inspect, samples):
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    for number in range(3):
        tensors = {f"{layer}.lora_down.weight": torch.ones(2, 2048),
                   f"{layer}.lora_up.weight": torch.ones(8, 2)}  # fmt: skip
        save_file(tensors, samples / f"other {number}.safetensors")
    _, printed = inspect(samples)
    (line,) = [line for line in printed.splitlines() if "sdxl:" in line]
    assert line.startswith("other 0.safetensors and 2 more: it is an adapter for sdxl: ")
    assert "load it into a model of that family" in line


@pytest.mark.fault("46 D5")
def test_a_folder_names_what_is_wrong_with_many_files_once(inspect, samples):
    for number in range(3):
        save_file({"some.weight": torch.ones(4, 4)}, samples / f"unknown {number}.safetensors")
    _, printed = inspect(samples)
    lines = [line for line in printed.splitlines() if line.startswith("unknown ")]
    assert lines == [
        "unknown 0.safetensors and 2 more: none of its tensors has the name of a layer of "
        "FLUX.1 or SD3"
    ]
