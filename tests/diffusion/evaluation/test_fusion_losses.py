"""Losses of fused adapters at fixed times."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.evaluation import fusion_scores as measured
from diffusion.evaluation.fusion_scores import fixed_draws, fixed_losses
from diffusion.experiments.adapter_conditions import CaptionScores
from diffusion.experiments.combined_losses import EVERY, FIRST, MANY, OTHERS, fusion_of
from diffusion.fusion import GatedFusion
from diffusion.models.embedded_base import transformer_of
from diffusion.models.flow_matching import velocity
from diffusion.models.text_encoders import TextStates
from diffusion.rivals import make_rival
from tests.diffusion.random_adapters import random_adapter


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformer_of("unit").eval().requires_grad_(False)


@pytest.fixture
def task():
    torch.manual_seed(1)
    text = TextStates(torch.randn(3, 5, 384), torch.randn(3, 384))
    return torch.randn(3, 12, 4, 4), text


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
    adapters = {"a": random_adapter(model, 1, size=0.3), "b": random_adapter(model, 2, size=0.3)}
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
    taken = fixed_losses(model, make_rival("switch", model, adapters), *task, steps=1)
    assert_close(
        taken, fixed_losses(model, GatedFusion(model, {"a": adapters["a"]}), *task, steps=1)
    )


def test_faults_are_one_line(model, task, one_line):
    assert "0 steps" in one_line(GatesError, fixed_losses, model, None, *task, steps=0)
    fewer = task[0][:2], task[1]
    assert "2 latents and 3" in one_line(GatesError, fixed_losses, model, None, *fewer)


def test_times_are_the_midpoints_of_a_run_and_later_for_a_shift():
    latents = torch.zeros(2, 12, 8, 8)
    plain = [float(at.t[0]) for at in fixed_draws(latents, 4, 0)]
    assert_close(plain, [0.875, 0.625, 0.375, 0.125])
    late = [float(at.t[0]) for at in fixed_draws(latents, 4, 0, shift=3.0)]
    assert_close(late, [3 * t / (1 + 2 * t) for t in plain])


def test_the_floor_is_what_unrelated_prompts_do_not_reach():
    suits = CaptionScores.__new__(CaptionScores)
    suits.vectors = dict(zip("abc", torch.eye(3), strict=True))
    text = SimpleNamespace(embed=lambda texts: torch.full((len(texts), 3), 0.3))
    assert suits.floor(text) == pytest.approx(0.3)


def test_settings_of_strengths_and_of_what_is_left_out_are_not_those_of_a_rival(model, task):
    bench = SimpleNamespace(base=SimpleNamespace(transformer=model))
    adapters = {"a": random_adapter(model, 1, size=0.3), "b": random_adapter(model, 2, size=0.3)}
    settings = {FIRST: 1.0, OTHERS: 0.5, "leave": "lowest", "encoder": "digest"}
    fusion = fusion_of(bench, "sum", settings, adapters, None)
    assert fusion.strengths == {"a": 1.0, "b": 0.5}
    fusion.set_strengths({"b": 0.0})
    alone = make_rival("sum", model, {"a": adapters["a"]})
    assert_close(*(fixed_losses(model, one, *task, steps=1) for one in (fusion, alone)))


@pytest.mark.fault("47 fusion rivals")
@pytest.mark.parametrize(("names", "strength"), [("ab", 0.8), ("abc", 0.6)])
def test_one_number_multiplies_all_adapters_and_another_number_many(model, task, names, strength):
    bench = SimpleNamespace(base=SimpleNamespace(transformer=model))
    adapters = {name: random_adapter(model, ord(name), size=0.3) for name in names}
    fusion = fusion_of(bench, "sum", {EVERY: 0.8, MANY: 0.75}, adapters, None)
    assert fusion.strengths == pytest.approx(dict.fromkeys(names, strength))
    weighed = make_rival("sum", model, adapters)
    weighed.set_strengths(dict.fromkeys(names, strength))
    found, expected = (fixed_losses(model, one, *task, steps=1) for one in (fusion, weighed))
    assert_close(found, expected)
