import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel
from torch.testing import assert_close

from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import (
    flow_matching_losses,
    image_ids,
    logit_normal,
    noised,
    packed,
    unpacked,
    velocity,
)
from diffusion.models.text_encoders import HashedNgrams


def test_the_ends_of_the_way():
    z, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    at = noised(z, torch.tensor([0.0, 1.0]), noise)
    assert_close(at.x, torch.stack([z[0], noise[1]]))
    assert_close(at.target, noise - z)
    step = noised(z, torch.tensor([0.25, 0.25]), noise)
    assert_close(step.x + 0.5 * step.target, noised(z, torch.tensor([0.75, 0.75]), noise).x)


def test_tokens_are_arranged_as_the_pipeline_does():
    z = torch.randn(2, 16, 8, 4)
    assert torch.equal(packed(z), FluxPipeline._pack_latents(z, 2, 16, 8, 4))
    assert torch.equal(unpacked(packed(z), 8, 4), z)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 2, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(4, 2, z), ids)


def test_times_are_logit_normal():
    torch.manual_seed(0)
    logits = logit_normal(20_000).logit()
    assert abs(float(logits.mean())) < 0.03
    assert abs(float(logits.std()) - 1) < 0.03


def test_the_loss_is_that_of_the_velocity():
    torch.manual_seed(0)
    model, text = transformer_of("unit"), HashedNgrams().encode(["a", "b"])
    at = noised(torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.6]), torch.randn(2, 16, 8, 8))
    found = velocity(model, at.x, at.t, text)
    assert found.shape == at.x.shape
    assert not torch.allclose(found, velocity(model, at.x, at.t.flip(0), text))
    expected = (found - at.target).square().mean((1, 2, 3))
    assert_close(flow_matching_losses(model, at, text), expected)


def test_sd3_counts_time_to_a_thousand():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    text = HashedNgrams(32).encode(["a"])
    x = torch.randn(1, 4, 8, 8)
    found = velocity(model, x, torch.tensor([0.5]), text)
    direct = model(x, text.tokens, text.pooled, torch.tensor([500.0]), return_dict=False)[0]
    assert_close(found, direct)


@pytest.mark.parametrize("shape", ["tiny", "unit"])
def test_sizes_of_the_embedded_base(shape):
    with torch.device("meta"):
        count = sum(p.numel() for p in transformer_of(shape).parameters())
    assert count == {"tiny": 5_256_768, "unit": 94_912}[shape]
