"""The suite ``language``: both sides compute the same, and bars belong to variants."""

import pytest
import torch

from benchmarks import language
from benchmarks.comparison import load_head
from benchmarks.suites import load_suite


@pytest.fixture
def small(monkeypatch):
    sizes = {"DIMS": (8, 16), "LAYERS": 2, "HEADS": 2, "KV_HEADS": 1, "CONTEXT": 12, "BATCH": 2}
    sizes |= {"PROMPT": 5, "ADDED": 6}
    for name, value in sizes.items():
        monkeypatch.setattr(language, name, value)


def test_sizes_and_bars_are_those_of_the_page():
    suite = load_suite("language")
    assert suite.threads == 1
    assert (language.DIMS, language.BATCHES) == ((128, 256), (1, 8))
    found = list(suite.comparisons())
    assert len(found) == len({one.name for one in found}) == 8 + 16 + 3
    bars = [one.bars["ours"] for one in found[:8]]
    assert bars == pytest.approx([1 / 0.95, 1 / 0.95, 1 / 0.9, 1 / 0.9] * 2)
    assert {one.bars["ours"] for one in found[8:24]} == {1.0}


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


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(language, "is_installed", lambda: False)
    comparison = language.training_step("Llama", 128)
    assert comparison.absent == {"transformers": language.ABSENT}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_tokens_go_to_different_experts(name, small):
    model, _ = language.pair(name, 16, load_head)["ours"]
    with torch.no_grad():
        chosen = model.blocks[0].mlp.gate(torch.randn(64, 16)).indices
    assert len(chosen.unique()) > 4
