"""SeqBoat next to itself: equal to the bit without empty slots, and a decoder of its size."""

import pytest
import torch

from benchmarks import seqboat
from benchmarks.comparison import load_head
from core_gates.attention.sma import prefill
from language.seqboat.sequence_model import recorded


def test_a_layer_without_empty_slots_is_equal_to_the_bit():
    calls = seqboat.layers(load_head)
    assert torch.equal(calls["compressed"](), calls["all slots"]())


def test_a_step_is_that_of_the_whole_sequence(monkeypatch):
    monkeypatch.setattr(seqboat, "LATE", 1200)
    layer = seqboat.models(load_head)["a quarter attends"].blocks[0]
    calls = seqboat.steps(load_head)
    assert [*calls] == ["after 1024", "after 1200"]
    for length, call in zip((1024, 1200), calls.values(), strict=True):
        x = torch.cat([seqboat._tokens(length), seqboat._tokens(1)], 1)
        with torch.no_grad():
            y, _ = prefill(layer, x)
        assert torch.allclose(call()[0], y[:, -1], atol=1e-5)


def test_models_have_equal_parameters_and_the_named_densities():
    models = seqboat.models(load_head)
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert max(sizes) < 1.001 * min(sizes)
    for name, density in seqboat.DENSITIES.items():
        with torch.no_grad(), recorded(models[name]) as passes:
            models[name](torch.zeros(1, 2048, dtype=torch.int64))
        assert passes[0].density.tolist() == pytest.approx([density] * 4, abs=0.02)


def test_bars_belong_to_variants(monkeypatch):
    monkeypatch.setattr(seqboat, "LATE", 1200)
    monkeypatch.setattr(seqboat, "LENGTHS", (1024,))
    for comparison in seqboat.comparisons():
        assert {comparison.baseline, *comparison.bars} <= {*comparison.build(load_head)}
