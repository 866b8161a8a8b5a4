import json

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.data.scenes import images_of, scenes, spread
from diffusion.models.embedded_base import EmbeddedBase, PatchAutoencoder, transformer_of
from diffusion.models.text_encoders import HashedNgrams, text_encoder


@pytest.fixture(scope="module")
def images():
    return images_of(spread(scenes("adapter"), 64))


@pytest.fixture(scope="module")
def base(images):
    torch.manual_seed(0)
    named = {"name": "ngrams", "fingerprint": HashedNgrams().fingerprint}
    return EmbeddedBase(transformer_of("unit"), PatchAutoencoder.fitted(images), named)


def test_latents_have_variance_one_and_the_best_components(base, images):
    latents = base.latents(images)
    assert latents.shape == (len(images), 12, 16, 16)
    centered = latents - latents.mean((0, 2, 3), keepdim=True)
    assert_close(centered.square().mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
    assert torch.equal(centered.square().mean((0, 2, 3)).argsort(descending=True), torch.arange(12))
    made = base.vae.decode(base.vae.encode(images), return_dict=False)[0]
    assert_close(made, images, rtol=0, atol=1e-5)  # nothing is lost


def test_components_that_are_left_out_are_the_smallest(images):
    vae = PatchAutoencoder.fitted(images, stride=4, latent_channels=16)
    made = vae.decode(vae.encode(images), return_dict=False)[0]
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).reshape(-1, 48)
    lost = torch.linalg.svdvals(patches - patches.mean(0))[16:].square().sum() / len(patches) / 48
    assert_close((made - images).square().mean(), lost, rtol=1e-3, atol=0)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_pipeline_learns_the_stride(base, stride):
    vae = PatchAutoencoder(stride=stride, latent_channels=3)
    assert EmbeddedBase(base.transformer, vae, {}).pipeline().vae_scale_factor == stride


def test_the_pipeline_is_the_one_of_diffusers_and_repeats(base):
    assert type(base.pipeline()) is FluxPipeline
    text, words = HashedNgrams(), ["a red heart", "a dog"]
    states, empty = text.encode(words), text.encode([""])
    made = base.images(states, empty, seeds=[1, 2], steps=2)
    assert made.shape == (2, 3, 32, 32)
    assert 0 <= made.min() < made.max() <= 1
    assert_close(base.images(states[1:], empty, seeds=[2], steps=2)[0], made[1], rtol=0, atol=1e-5)
    other = base.images(states[1:], empty, seeds=[3], steps=2)
    assert not torch.allclose(other[0], made[1], atol=1e-2)


def test_guidance_moves_away_from_the_empty_caption(base):
    text = HashedNgrams()
    states, empty = text.encode(["a red heart"]), text.encode([""])
    one = base.images(states, empty, seeds=[1], steps=1, guidance=1.0)
    none = base.images(empty, empty, seeds=[1], steps=1, guidance=1.0)
    far = base.images(states, empty, seeds=[1], steps=1, guidance=2.0)
    inside = (far > 0) & (far < 1) & (one > 0) & (one < 1) & (none > 0) & (none < 1)
    assert_close((2 * one - none)[inside], far[inside], rtol=0, atol=1e-4)


def test_a_saved_base_is_the_same_to_bfloat16(base, tmp_path):
    base.save(tmp_path)
    found = EmbeddedBase.load(tmp_path)
    assert found.text_encoder == base.text_encoder
    for mine, theirs in ((base.transformer, found.transformer), (base.vae, found.vae)):
        state = theirs.state_dict()
        for name, tensor in mine.state_dict().items():
            assert torch.equal(state[name], tensor.bfloat16().float())
    assert found.vae.config.scaling_factor == base.vae.config.scaling_factor
    assert not any(p.requires_grad for p in found.transformer.parameters())


def test_a_text_encoder_of_another_training_is_refused(base):
    base.check_text_encoder(HashedNgrams())
    with pytest.raises(GatesError, match="trained with the text encoder ngrams"):
        base.check_text_encoder(HashedNgrams(length=8))


def nan(folder):
    tensors = load_file(folder / "result.safetensors")
    tensors["vae.mean"][0] = torch.nan
    save_file(tensors, folder / "result.safetensors")


def lacking(folder):
    tensors = load_file(folder / "result.safetensors")
    del tensors["transformer.x_embedder.weight"]
    save_file(tensors, folder / "result.safetensors")


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["transformer"]["num_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder):
    path = folder / "result.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan, "not finite"),
        (lacking, "damaged base"),
        (other_shape, "damaged base"),
        (cut, "damaged base"),
        (lambda f: (f / "config.json").unlink(), "missing or damaged"),
        (lambda f: (f / "config.json").write_text("{"), "missing or damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "does not describe"),
        (lambda f: (f / "result.safetensors").unlink(), "damaged base"),
    ],
)
def test_damaged_bases_are_one_line(base, tmp_path, spoil, words):
    base.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(GatesError, match=words) as caught:
        EmbeddedBase.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_there_are_two_text_encoders():
    with pytest.raises(GatesError, match="minilm, ngrams"):
        text_encoder("clip")
