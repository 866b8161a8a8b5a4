"""Pipelines from local files, and images and captions as models see them."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from core_gates.errors import GatesError
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.pipelines import PipelineCodec, latents_of, load_codec, load_pipeline
from diffusion.models.text_encoders import ClipText, HashedNgrams, text_encoder

PARTS = "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=12, block_out_channels=(8, 8, 8), norm_num_groups=2, sample_size=8,
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
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8
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
    (tmp_path / "config.json").write_text(json.dumps({"kind": "gatesuite embedded base"}))
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
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipe.transformer.state_dict()[n], t) for n, t in state.items())


WIDTH = 16
CAPTIONS = ["a red apple", "the blue boat", ""]


def clip_tokenizer(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )


def t5_tokenizer():
    words = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", "red", "blue", "apple"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def clip(kind, dim):
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=dim, intermediate_size=16, num_hidden_layers=2,
        projection_dim=dim, num_attention_heads=2, max_position_embeddings=12, bos_token_id=52,
        eos_token_id=53,
    )  # fmt: skip
    return kind(config).eval()


def t5():
    config = T5Config(
        vocab_size=6, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder():
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


def flux(folder):
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(), transformer=transformer,
        text_encoder=clip(CLIPTextModel, WIDTH), tokenizer=clip_tokenizer(folder),
        text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def sd3(folder):
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
        pooled_projection_dim=WIDTH, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder)
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder(), transformer=transformer,
        text_encoder=clip(CLIPTextModelWithProjection, 8), tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, 8), tokenizer_2=tokenizer,
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[flux, sd3], ids=["flux", "sd3"])
def whole_pipe(request, tmp_path_factory):
    """The folder of a pipeline with all its parts, and its family."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp(request.param.__name__)
    request.param(place / "words").save_pretrained(place / "pipe")
    return place / "pipe", request.param.__name__


@pytest.fixture
def codec(whole_pipe):
    return load_codec(whole_pipe[0], 16)


@pytest.fixture
def images(tmp_path):
    paths = []
    for number in range(11):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20, 16), (number * 20, 255 - number * 20, 99)).save(paths[-1])
    return paths


def test_states_are_those_of_the_pipeline(codec, whole_pipe):
    assert codec.family == whole_pipe[1]
    found = codec.states(CAPTIONS * 4)
    assert len(found.tokens) == len(found.pooled) == 12
    pipe = codec.pipeline
    with torch.no_grad():
        if codec.family == "flux":
            tokens, pooled, _ = pipe.encode_prompt(CAPTIONS[:1], None)
        else:
            tokens, _, pooled, _ = pipe.encode_prompt(
                CAPTIONS[:1], None, None, do_classifier_free_guidance=False
            )
    assert_close(found.tokens[9:10], tokens)
    assert_close(found.pooled[9:10], pooled)
    assert not torch.allclose(found.pooled[0], found.pooled[1])


def test_latents_are_decoded_again_and_encoded_in_parts(codec, images):
    found = latents_of(codec, images)
    assert found.shape == (11, 4, 8, 8)
    vae = codec.pipeline.vae
    whole = torch.stack([torch.zeros(3, 16, 16)])
    mode = vae.encode(whole).latent_dist.mode()
    assert_close(codec.latents(whole), (mode - 0.1) * 0.4)
    assert not torch.allclose(found[0], found[5])


def test_the_text_encoder_of_the_retriever_is_the_tower_of_flux(whole_pipe):
    folder, family = whole_pipe
    found = text_encoder(str(folder))
    assert isinstance(found, ClipText)
    states = found.encode(CAPTIONS)
    assert_close(states.pooled.norm(dim=1), torch.ones(3))
    assert_close(found.embed(CAPTIONS[:1]), states.pooled[:1])
    assert found.fingerprint == ClipText(folder).fingerprint
    if family == "flux":
        pooled = load_codec(folder, 16).states(CAPTIONS).pooled
        assert_close(states.pooled, pooled / pooled.norm(dim=1, keepdim=True))


def test_what_is_refused(codec, whole_pipe, tmp_path, one_line):
    assert "a multiple of 4" in one_line(GatesError, load_codec, whole_pipe[0], 18)
    assert "a multiple of 4" in one_line(GatesError, PipelineCodec, codec.pipeline, 0)
    assert "holds no text encoder of CLIP" in one_line(GatesError, ClipText, tmp_path)
    assert "no text encoder is named" in one_line(GatesError, text_encoder, "none")
    codec.release()
    assert "has no vae" in one_line(GatesError, PipelineCodec, codec.pipeline, 16)
    assert "str is no pipeline" in one_line(GatesError, PipelineCodec, "x")
