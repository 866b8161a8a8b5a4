"""Flow matching: noised latents, losses, and the training of models and adapters."""

import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import (
    FlowMatchingModule,
    LatentDataModule,
    bundle_of,
    flow_matching_losses,
    image_ids,
    layers_of,
    logit_normal,
    noised,
    packed,
    shifted,
    trainable_factors,
    unpacked,
    velocity,
)
from diffusion.models.text_encoders import HashedNgrams, TextStates
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import quiet_lightning


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
    at = noised(torch.randn(2, 12, 8, 8), torch.tensor([0.3, 0.6]), torch.randn(2, 12, 8, 8))
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
    assert count == {"tiny": 1_545_776, "unit": 93_872}[shape]


@pytest.fixture
def data():
    torch.manual_seed(0)
    text = HashedNgrams().encode([f"drawing {n}" for n in range(8)])
    return LatentDataModule(torch.randn(8, 12, 8, 8) * 0.3 + 1, text, 4)


@pytest.fixture
def trainer(tmp_path):
    quiet_lightning()
    return ExactTrainer(
        max_steps=30, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip


def loss_of(model, data):
    noise = torch.randn(8, 12, 8, 8, generator=torch.Generator().manual_seed(1))
    at = noised(data.data.latents, torch.full((8,), 0.5), noise)
    with torch.no_grad():
        return float(flow_matching_losses(model, at, data.data.text).mean())


def test_batches_hold_latents_with_their_captions(data):
    seen = list(data.train_dataloader())
    assert len(seen) == 2
    for batch in seen:
        rows = [int((data.data.latents == z).flatten(1).all(1).nonzero()) for z in batch.latents]
        assert torch.equal(batch.tokens, data.data.text.tokens[rows])
        assert torch.equal(batch.pooled, data.data.text.pooled[rows])
    with pytest.raises(ValueError, match="8 latents have 7 captions"):
        LatentDataModule(data.data.latents, data.data.text[:7])


def test_repeated_latents_are_not_copied(data):
    rows = [0, 0, 0, 5]
    torch.manual_seed(0)
    often = LatentDataModule(data.data.latents, data.data.text, 2, rows)
    copied = LatentDataModule(data.data.latents[rows], data.data.text.of(rows), 2)
    assert often.data.latents is data.data.latents
    found = []
    for module in (often, copied):
        torch.manual_seed(1)
        found.append(list(module.train_dataloader()))
    assert len(found[0]) == 2
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_loss_falls_and_the_rate_ends_at_zero(data, trainer):
    torch.manual_seed(0)
    model = transformer_of("unit")
    before = loss_of(model, data)
    module = FlowMatchingModule(
        model, HashedNgrams().encode([""]), steps=30, learning_rate=3e-3, warmup_steps=5
    )
    trainer.fit(module, data)
    assert loss_of(model, data) < 0.8 * before
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0


def test_captions_are_dropped(data):
    empty = TextStates(torch.full((1, 16, 384), 7.0), torch.full((1, 384), 7.0))
    seen = []

    class Spy(torch.nn.Linear):
        config = type("Config", (), {"guidance_embeds": False})

        def forward(self, hidden_states, pooled_projections, encoder_hidden_states, **rest):
            dropped = (encoder_hidden_states == 7).all((1, 2))
            assert torch.equal(dropped, (pooled_projections == 7).all(1))
            seen.extend(dropped.tolist())
            return (hidden_states,)

    module = FlowMatchingModule(Spy(1, 1), empty, steps=9, caption_dropout=0.25)
    torch.manual_seed(0)
    module.log = lambda *_, **__: None
    for _ in range(100):
        for number, batch in enumerate(data.train_dataloader()):
            module.training_step(batch, number)
    assert 0.2 < sum(seen) / len(seen) < 0.3


def test_parts_of_a_block_are_its_layers():
    model = transformer_of("unit")
    parts = {part: layers_of(model, [part]) for part in ("attention", "mlp", "modulation")}
    every = layers_of(model, parts)
    assert sorted(every) == sorted(name for own in parts.values() for name in own)
    assert len(every) == 14 + 6
    assert "single_transformer_blocks.0.proj_out" in parts["mlp"]
    assert "proj_out" not in every
    assert all("norm" in name for name in parts["modulation"])
    with pytest.raises(GatesError, match="no part of a block is named 'vae'"):
        layers_of(model, ["vae"])


def test_an_adapter_alone_is_trained_and_taken_out(data, trainer):
    torch.manual_seed(0)
    model = transformer_of("unit")
    model.proj_out.weight.data.normal_(std=0.1)
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = loss_of(model, data)
    with trainable_factors(model, layers_of(model, ["attention", "mlp"]), 2) as factors:
        module = FlowMatchingModule(
            model, HashedNgrams().encode([""]), factors, steps=30, learning_rate=2e-2,
            warmup_steps=1,
        )  # fmt: skip
        assert sum(p.numel() for p in module.parameters()) == sum(
            p.numel() for p in factors.values()
        )
        trainer.fit(module, data)
        inside = loss_of(model, data)
        bundle = bundle_of(factors, "flux", {"title": "a"}, torch.float32)
    assert inside < 0.95 * before
    assert model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(t, untouched[n]) for n, t in model.state_dict().items())
    assert set(bundle.ranks().values()) == {2}
    with GatedFusion(model, {"a": bundle}, mode="sum"):
        assert loss_of(model, data) == pytest.approx(inside, rel=1e-4)


def test_factors_are_stored_as_they_will_be_read():
    down = torch.tensor([[1 / 3, 2.0]])
    name = "transformer_blocks.0.attn.to_q"
    factors = {f"{name}.lora_A.trained.weight": down, f"{name}.lora_B.trained.weight": down.T}
    found = bundle_of(factors, "flux", {})
    assert torch.equal(found.modules[name].down, down.bfloat16().float())
    assert found.storage == torch.bfloat16


def test_shifted_times_keep_their_ends():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert_close(shifted(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert_close(shifted(t, 1.0), t)
