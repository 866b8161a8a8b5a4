"""Pipelines from local files, and what is wrong with files in one line."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.pipelines import load_codec, load_pipeline
from diffusion.models.text_encoders import HashedNgrams

PARTS = "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 8), norm_num_groups=2, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer_of("unit"),
        **dict.fromkeys(PARTS),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipe")


def image(pipe):
    text = HashedNgrams().encode(["a red heart"])
    return pipe(
        prompt_embeds=text.tokens.to(pipe.dtype), pooled_prompt_embeds=text.pooled.to(pipe.dtype),
        height=16, width=16, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_a_folder_of_diffusers_in_every_mode(folder, offload):
    loaded = load_pipeline(folder, offload=offload, device="cpu")
    assert type(loaded.pipe) is FluxPipeline
    assert loaded.base is None
    assert not any(p.requires_grad for p in loaded.pipe.transformer.parameters())
    plain = load_pipeline(folder).pipe
    assert_close(image(loaded.pipe), image(plain))


def test_the_dtype_is_that_of_the_parameters(folder):
    pipe = load_pipeline(folder, dtype=torch.bfloat16).pipe
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}


def test_a_gguf_file_with_the_other_parts(folder, write_gguf, tmp_path):
    plain = load_pipeline(folder).pipe
    path = write_gguf(plain.transformer, tmp_path / "flux.gguf")
    shutil.move(folder / "transformer" / "config.json", tmp_path)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    shutil.move(tmp_path / "config.json", folder / "transformer")
    pipe = load_pipeline(path, components=folder).pipe
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == torch.uint8
    found, expected = image(pipe), image(plain)
    assert_close(found, expected, rtol=0, atol=0.02)
    assert not torch.equal(found, expected)


def test_an_embedded_base(tmp_path):
    torch.manual_seed(0)
    vae = PatchAutoencoder.fitted(torch.rand(20, 3, 32, 32) * 2 - 1)
    made = EmbeddedBase(transformer_of("unit"), vae, {"name": "ngrams", "fingerprint": "0"})
    made.save(tmp_path)
    loaded, made = load_pipeline(tmp_path), EmbeddedBase.load(tmp_path)
    assert loaded.base.size == 32
    assert loaded.pipe.transformer is loaded.base.transformer
    assert_close(image(loaded.pipe), image(made.pipeline()))
    assert load_pipeline(tmp_path, dtype=torch.bfloat16).pipe.transformer.dtype == torch.bfloat16


def test_images_and_captions_as_a_base_sees_them(tmp_path, folder, one_line):
    vae, text = PatchAutoencoder.fitted(torch.rand(20, 3, 32, 32) * 2 - 1), HashedNgrams()
    found = {"name": "ngrams", "fingerprint": text.fingerprint}
    made = EmbeddedBase(transformer_of("unit"), vae, found)
    made.save(tmp_path)
    made, codec = EmbeddedBase.load(tmp_path), load_codec(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert (codec.family, codec.size) == ("flux", 32)
    assert_close(codec.latents(images), made.latents(images))
    assert_close(codec.states(["a dog"])._asdict(), text.encode(["a dog"])._asdict())
    assert "has no text_encoder" in one_line(GatesError, load_codec, folder)


def test_what_is_wrong_is_said_in_one_line(folder, tmp_path, one_line, write_gguf):
    load = partial(one_line, GatesError, load_pipeline)
    assert "holds no pipeline" in load(tmp_path / "none")
    assert "offload is 'disk'" in load(folder, offload="disk")
    assert "needs an accelerator" in load(folder, offload="sequential", device="cpu")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in load(folder)
    weights.unlink()
    assert "must hold weights as .safetensors, found none" in load(folder)
    (weights.parent / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    assert "pickled weights only (diffusion_pytorch_model.bin)" in load(folder)
    weights.write_bytes(content)
    shutil.move(folder / "vae", folder / "hidden")
    assert "vae is missing" in load(folder)
    shutil.move(folder / "hidden", folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    for change, words in (
        ({"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline"),
        ({"vae": ["os", "system"]}, "not of diffusers, transformers"),
        ({"transformer": ["diffusers", "AutoencoderKL"]}, ""),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        assert words in load(folder)
    (folder / "model_index.json").write_text("{")
    assert "holds no pipeline" in load(folder)
    config = {"kind": "gatesuite embedded base"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "damaged base" in load(tmp_path)


def test_wrong_gguf_files(folder, tmp_path, one_line, write_gguf):
    load = partial(one_line, GatesError, load_pipeline)
    model = transformer_of("unit")
    path = write_gguf(model, tmp_path / "flux.gguf")
    assert "give components=" in load(path)
    assert "cannot be read" in load(tmp_path / "none.gguf", components=folder)
    content = path.read_bytes()
    for damage, words in (
        (b"", "begins with b''"),
        (b"PK\x03\x04", "is no GGUF file"),
        (content[:100], "cannot be loaded"),
        (content[: len(content) // 2], "cannot be loaded"),
    ):
        path.write_bytes(damage)
        assert words in load(path, components=folder)
    del model.proj_out
    text = load(write_gguf(model, path), components=folder)
    assert "lacks 2 tensors" in text or "cannot be loaded" in text


def test_nothing_is_unpickled(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was unpickled"))
    pipe = load_pipeline(folder).pipe
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    assert all(torch.equal(pipe.transformer.state_dict()[n], t) for n, t in state.items())
