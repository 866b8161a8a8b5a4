"""The suite ``language``: both sides compute the same, and bars belong to variants."""

import pytest
import torch

from benchmarks import language
from benchmarks.comparison import load_head


@pytest.fixture
def small(monkeypatch):
    sizes = {"DIMS": (8, 16), "LAYERS": 2, "HEADS": 2, "KV_HEADS": 1, "CONTEXT": 12, "BATCH": 2}
    sizes |= {"PROMPT": 5, "ADDED": 6}
    for name, value in sizes.items():
        monkeypatch.setattr(language, name, value)


@pytest.mark.parametrize("name", language.FAMILIES)
def test_a_step_is_that_of_transformers(name, small):
    calls = language.training_step(name, 16).build(load_head)
    losses = [(calls["ours"]().item(), calls["transformers"]().item()) for _ in range(3)]
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert losses[2][0] < losses[0][0]  # a step was taken


@pytest.mark.parametrize("name", language.FAMILIES)
def test_continuations_are_those_of_transformers(name, small):
    calls = language.generation(name, 16, 2).build(load_head)
    ours, theirs = (calls[one]() for one in ("ours", "transformers"))
    assert ours.shape == (2, 6)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_tokens_go_to_different_experts(name, small):
    model, _ = language.pair(name, 16, load_head)["ours"]
    with torch.no_grad():
        chosen = model.blocks[0].mlp.gate(torch.randn(64, 16)).indices
    assert len(chosen.unique()) > 4
