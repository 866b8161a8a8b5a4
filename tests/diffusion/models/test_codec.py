"""Images and captions as pipelines of diffusers see them, with all their parts."""

import json

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
from diffusion.models.flow_matching import (
    bundle_of,
    flow_matching_losses,
    layers_of,
    noised,
    trainable_factors,
)
from diffusion.models.pipelines import PipelineCodec, latents_of, load_codec
from diffusion.models.text_encoders import ClipText, text_encoder

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
def saved(request, tmp_path_factory):
    """The folder of a pipeline with all its parts, and its family."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp(request.param.__name__)
    request.param(place / "words").save_pretrained(place / "pipe")
    return place / "pipe", request.param.__name__


@pytest.fixture
def codec(saved):
    return load_codec(saved[0], 16)


@pytest.fixture
def images(tmp_path):
    paths = []
    for number in range(11):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20, 16), (number * 20, 255 - number * 20, 99)).save(paths[-1])
    return paths


def test_states_are_those_of_the_pipeline(codec, saved):
    assert codec.family == saved[1]
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


def test_an_adapter_is_trained_in_place_of_the_model(codec, images):
    latents, text = latents_of(codec, images[:4]), codec.states(CAPTIONS[:2] * 2)
    codec.release()
    assert codec.pipeline.text_encoder is None
    assert codec.pipeline.vae is None
    model = codec.transformer.bfloat16()
    layers = layers_of(model, ("attention", "mlp", "modulation"))
    draw = torch.Generator().manual_seed(0)
    at = noised(latents, torch.full((4,), 0.5), torch.randn(latents.shape, generator=draw))
    losses = []
    with trainable_factors(model, layers, 2) as factors:
        assert {factor.dtype for factor in factors.values()} == {torch.float32}
        optimizer = torch.optim.Adam(factors.values(), 0.02)
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16):
                loss = flow_matching_losses(model, at, text).mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bundle = bundle_of(factors, codec.family, {})
    assert losses[-1] < 0.97 * losses[0]
    assert len(bundle.modules) == len(layers)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_text_encoder_of_the_retriever_is_the_tower_of_flux(saved):
    folder, family = saved
    found = text_encoder(str(folder))
    assert isinstance(found, ClipText)
    states = found.encode(CAPTIONS)
    assert_close(states.pooled.norm(dim=1), torch.ones(3))
    assert_close(found.embed(CAPTIONS[:1]), states.pooled[:1])
    assert found.fingerprint == ClipText(folder).fingerprint
    if family == "flux":
        pooled = load_codec(folder, 16).states(CAPTIONS).pooled
        assert_close(states.pooled, pooled / pooled.norm(dim=1, keepdim=True))


def test_what_is_refused(codec, saved, tmp_path, one_line):
    assert "a multiple of 4" in one_line(GatesError, load_codec, saved[0], 18)
    assert "a multiple of 4" in one_line(GatesError, PipelineCodec, codec.pipeline, 0)
    assert "holds no text encoder of CLIP" in one_line(GatesError, ClipText, tmp_path)
    assert "no text encoder is named" in one_line(GatesError, text_encoder, "none")
    codec.release()
    assert "has no vae" in one_line(GatesError, PipelineCodec, codec.pipeline, 16)
    assert "str is no pipeline" in one_line(GatesError, PipelineCodec, "x")
