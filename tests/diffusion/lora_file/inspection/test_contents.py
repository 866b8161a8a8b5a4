"""Everything that is found in a file, as plain values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion.lora_file import ContainerError, FamilyError
from diffusion.lora_file.inspection import examine

FORMATS = Path(__file__).parents[3] / "golden" / "autolora" / "formats"


def test_plain_values_have_everything():
    found = examine(FORMATS / "kohya_flux_full.safetensors")
    state = json.loads(json.dumps(found.state(), allow_nan=False))
    assert state["file"] == "kohya_flux_full.safetensors"
    assert state["family"] == "flux"
    assert state["tensors"] == 56
    assert state["title"] == "demo_style"
    assert state["auto_v2"] == state["sha256"][:10]
    assert len(state["auto_v3"]) == 12
    assert set(state["layers"]["proj_out"]) == {
        "rank", "in_features", "out_features", "scale", "norm", "dora"
    }  # fmt: skip
    assert [loader["effect"] for loader in state["loaders"]] == ["part"]


def test_a_hash_that_is_right_is_not_odd(tmp_path):
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(4, 4)
        for x in "AB"
    }
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.title": "x"})
    found = examine(tmp_path / "a.safetensors")
    stated = {"sshs_model_hash": found.tensors_sha256.upper()}
    save_file(tensors, tmp_path / "b.safetensors", stated)
    again = examine(tmp_path / "b.safetensors")
    assert again.auto_v3 == found.auto_v3
    assert again.auto_v2 != found.auto_v2
    assert not any("changed after" in odd for odd in again.odd)
    save_file(tensors, tmp_path / "b.safetensors", {"sshs_model_hash": "ab" * 32})
    assert any("changed after" in odd for odd in examine(tmp_path / "b.safetensors").odd)


def test_other_families_are_recognized(tmp_path):
    tensors = {f"blocks.0.self_attn.q.lora_{end}.weight": torch.ones(4, 4) for end in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.license": "MIT"})
    found = examine(tmp_path / "a.safetensors")
    assert found.family == "wan"
    assert found.layers == {}
    assert found.description.license == "MIT"
    with pytest.raises(FamilyError, match="is an adapter for wan"):
        examine(tmp_path / "a.safetensors", "flux")


def test_unsafe_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ContainerError, match="pickle"):
        examine(tmp_path / "a.safetensors")
