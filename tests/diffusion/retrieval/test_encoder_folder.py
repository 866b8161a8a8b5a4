"""Folders of encoders, good and damaged, and published files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.lora_file import LoraFileError
from diffusion.retrieval import (
    EncoderConfig,
    LoraWeightEncoder,
    TrainedEncoder,
    load_encoder,
    load_published,
    save_encoder,
)

VECTORS = Path(__file__).parents[2] / "golden/autolora/encoder_a.npz"


@pytest.fixture
def encoder(config):
    torch.manual_seed(0)
    return LoraWeightEncoder(config(types=("ff_a.0", "to_qkv_mlp")))


@pytest.fixture
def folder(encoder, tmp_path):
    return save_encoder(tmp_path / "encoder", encoder, text_fingerprint="words")


def test_a_saved_encoder_is_the_same(encoder, folder, adapter):
    loaded = load_encoder(folder, text_fingerprint="words")
    before = TrainedEncoder(encoder, "words")
    assert torch.equal(loaded.encode(adapter(0)), before.encode(adapter(0)))
    assert (loaded.fingerprint, len(loaded.fingerprint)) == (before.fingerprint, 16)
    assert (loaded.family, loaded.dim, loaded.text_fingerprint) == ("flux", 24, "words")
    assert loaded.config == encoder.config
    settings = json.loads((folder / "config.json").read_text())
    assert settings["encoder"]["family"] == "flux"
    assert settings["encoder"]["types"] == ["ff_a.0", "to_qkv_mlp"]
    assert settings["encoder"]["shape"]["num_single_layers"] == 2


def test_the_fingerprint_tells_weights_and_settings(encoder, folder, tmp_path):
    first = load_encoder(folder).fingerprint
    other = save_encoder(tmp_path / "other", encoder, text_fingerprint="another")
    half = save_encoder(tmp_path / "half", encoder, text_fingerprint="words", dtype=torch.bfloat16)
    assert len({first, load_encoder(other).fingerprint, load_encoder(half).fingerprint}) == 3
    stored = load_file(half / "encoder.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    save_encoder(folder, encoder, text_fingerprint="words")
    assert load_encoder(folder).fingerprint == first
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def edit(folder, change):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def weights(folder, change):
    path = folder / "encoder.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(folder):
    path = folder / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


FAULTS = {
    "no settings": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "no weights": (lambda f: (f / "encoder.safetensors").unlink(), "cannot be opened"),
    "truncated": (cut, "encoder.safetensors"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object"),
    "later": (lambda f: edit(f, lambda s: s.update(format=2)), "format 1"),
    "no encoder": (lambda f: edit(f, lambda s: s.pop("encoder")), "settings of the encoder"),
    "no shape": (lambda f: edit(f, lambda s: s["encoder"].pop("shape")), "shape"),
    "family": (lambda f: edit(f, lambda s: s["encoder"].update(family="wan")), "wan"),
    "unknown": (lambda f: edit(f, lambda s: s["encoder"].update(magic=1)), "magic"),
    "text": (lambda f: edit(f, lambda s: s["encoder"].update(dim="16")), "not a size"),
    "list": (lambda f: edit(f, lambda s: s["encoder"].update(dim=[16])), "not a size"),
    "huge": (lambda f: edit(f, lambda s: s["encoder"].update(dim=10**12)), "not a size"),
    "deep": (lambda f: edit(f, lambda s: s["encoder"].update(depth=10**6)), "layers"),
    "many": (lambda f: edit(f, lambda s: s["encoder"]["shape"].update(num_layers=10**6)), "blocks"),
    "true": (lambda f: edit(f, lambda s: s["encoder"].update(positions=1)), "true or false"),
    "option": (lambda f: edit(f, lambda s: s["encoder"].update(missing=["x"])), "missing"),
    "types": (lambda f: edit(f, lambda s: s["encoder"].update(types=["x"])), "types of layers"),
    "width": (lambda f: edit(f, lambda s: s["encoder"].update(dim=24)), "does not fit"),
    "NaN": (
        lambda f: weights(f, lambda t: t["final_linear.bias"].fill_(torch.nan)),
        "not finite",
    ),
    "lacking": (lambda f: weights(f, lambda t: t.pop("final_linear.bias")), "is missing"),
    "surplus": (lambda f: weights(f, lambda t: t.update(x=torch.ones(1))), "x is unknown"),
    "shape": (
        lambda f: weights(f, lambda t: t.update({"final_linear.bias": torch.ones(3)})),
        "is 3, expected 24",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders(fault, folder, one_line):
    damage, word = FAULTS[fault]
    damage(folder)
    assert word in one_line(LoraFileError, load_encoder, folder)


def test_another_text_encoder_is_refused(folder, tmp_path, one_line):
    message = one_line(LoraFileError, load_encoder, folder, text_fingerprint="other")
    assert "words" in message
    assert "other" in message
    assert "cannot be read" in one_line(LoraFileError, load_encoder, tmp_path / "none")


def test_the_file_of_autolora_loads(tmp_path, adapter):
    with np.load(VECTORS) as arrays:
        tensors = {k[2:]: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("w.")}
    for prefix in ("", "lora_encoder."):
        path = tmp_path / "published.safetensors"
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
        loaded = load_published(path, head_dim=8)
        config = loaded.config
        assert (config.dim, config.heads, config.hidden_dim, config.depth) == (16, 2, 32, 2)
        assert (config.attention_mask, config.missing) == ("causal", "refuse")
        found = loaded.encoder.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_file_of_diffsynth_studio_loads(tmp_path, config, adapter):
    torch.manual_seed(0)
    shape = config().shape._replace(num_heads=1, head_dim=16)
    settings = EncoderConfig.prompt_token(
        shape, text_dim=16, dim=16, heads=2, head_dim=8, hidden_dim=32, probes=3
    )
    encoder = LoraWeightEncoder(settings)
    names = set(encoder.state_dict())
    assert "embedder.model_dict.blocks___0___ff_a___0.layer_norm.weight" in names
    assert {"special_embeds", "final_linear.weight"} < names
    assert "position_embeds" not in names
    path = tmp_path / "token.safetensors"
    save_file(encoder.state_dict(), path)
    loaded = load_published(path, head_dim=8)
    assert loaded.config.pooling == "token"
    expected = TrainedEncoder(encoder).encode(adapter(0))
    assert torch.equal(loaded.encode(adapter(0)), expected)
    token = loaded.token(adapter(0))
    assert token.norm() > 1.1
    torch.testing.assert_close(token / token.norm(), expected)


def test_other_files_are_no_encoders(tmp_path, folder, one_line):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(2)}, path)
    assert "not an encoder" in one_line(LoraFileError, load_published, path)
    save_file(load_file(folder / "encoder.safetensors"), path)
    assert "not an encoder" in one_line(LoraFileError, load_published, path)
