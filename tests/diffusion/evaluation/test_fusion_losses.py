"""Losses of fused adapters at fixed times, what is left of each, and a linear denoiser."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.evaluation import fusion_scores as measured
from diffusion.evaluation.fusion_scores import SHRINKAGE, LinearDenoiser, fixed_losses
from diffusion.fusion import GatedFusion
from diffusion.lora_file import Factors, LoraBundle
from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import velocity
from diffusion.models.text_encoders import TextStates
from diffusion.rivals import make_rival


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformer_of("unit").eval().requires_grad_(False)


@pytest.fixture
def task():
    torch.manual_seed(1)
    text = TextStates(torch.randn(3, 5, 384), torch.randn(3, 384))
    return torch.randn(3, 16, 4, 4), text


def adapter(model, seed):
    draw = torch.Generator().manual_seed(seed)
    return LoraBundle("flux", {
        n: Factors(
            torch.randn(2, m.in_features, generator=draw) * 0.3,
            torch.randn(m.out_features, 2, generator=draw) * 0.3,
            1.0,
        )
        for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n
    })  # fmt: skip


def test_the_loss_is_a_mean_over_midpoints_of_the_schedule(model, task, monkeypatch):
    latents, text = task
    found = fixed_losses(model, None, latents, text, steps=4, seed=7)
    draw, expected = torch.Generator().manual_seed(7), torch.zeros(3)
    for t in (0.875, 0.625, 0.375, 0.125):
        noise = torch.randn(latents.shape, generator=draw)
        x, times = (1 - t) * latents + t * noise, torch.full((3,), t)
        off = velocity(model, x, times, text) - (noise - latents)
        expected += off.square().mean((1, 2, 3)) / 4
    assert_close(found, expected)
    monkeypatch.setattr(measured, "BATCH", 2)
    assert_close(fixed_losses(model, None, latents, text, steps=4, seed=7), expected)
    other = fixed_losses(model, None, latents, text, steps=4, seed=8)
    assert not torch.allclose(other, expected, rtol=1e-3)


def test_a_fusion_is_told_its_step_and_let_go(model, task):
    adapters = {"a": adapter(model, 1), "b": adapter(model, 2)}
    fusion, told = GatedFusion(model, adapters), []
    plain = fixed_losses(model, None, *task, steps=2)
    fusion.at = lambda step, steps: told.append((step, steps))
    found = fixed_losses(model, fusion, *task, steps=2)
    assert told == [(0, 2), (1, 2)]
    assert not fusion.attached
    assert not torch.allclose(found, plain, rtol=1e-3)
    with fusion:
        assert_close(fixed_losses(model, fusion, *task, steps=2), found)
        assert fusion.attached
    switch = make_rival("switch", model, adapters)
    taken = fixed_losses(model, switch, *task, steps=1)
    assert_close(
        taken, fixed_losses(model, GatedFusion(model, {"a": adapters["a"]}), *task, steps=1)
    )


def test_faults_are_one_line(model, task, one_line):
    assert "0 steps" in one_line(GatesError, fixed_losses, model, None, *task, steps=0)
    fewer = task[0][:2], task[1]
    assert "2 latents and 3" in one_line(GatesError, fixed_losses, model, None, *fewer)


def normal(count, seed, *, size=6):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99)).double()
    rows = torch.randn(count, size, generator=draw).double() @ mix.mT / 2 + 1.5
    return rows.view(count, 1, 2, 3)


def test_independent_latents_have_a_closed_form():
    mean, variance, t = torch.full((6,), 0.7).double(), 0.25, 0.4
    found = LinearDenoiser(mean, variance * torch.eye(6).double())
    x = normal(5, 0)
    r = (x - (1 - t) * 0.7) / ((1 - t) ** 2 * variance + t**2)
    assert_close(found.velocity(x, t), t * r - 0.7 - (1 - t) * variance * r)
    assert_close(found.velocity(x, 1.0), x - 0.7)  # pure noise: less the mean image


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_it_is_the_regression_of_velocities(t):
    z = normal(40_000, 1)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).double()
    x, wanted = (1 - t) * z + t * noise, noise - z
    found = LinearDenoiser.of(z).velocity(x, t)
    design = torch.cat([x.flatten(1), torch.ones(len(x), 1).double()], 1)
    fit = design @ torch.linalg.lstsq(design, wanted.flatten(1)).solution
    best = (fit - wanted.flatten(1)).square().mean()
    own = (found - wanted).square().mean()
    assert best <= own < best * (1 + 5 * SHRINKAGE)
    assert own < 0.9 * wanted.var()


def test_one_latent_has_no_covariance():
    with pytest.raises(GatesError, match="two latents"):
        LinearDenoiser.of(normal(1, 0))
