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
    layer, calls = seqboat.models(load_head)[seqboat.ALL].blocks[0], seqboat.steps(load_head)
    for length in (1024, 1200):
        y, _ = prefill(layer, torch.cat([seqboat._tokens(length), seqboat._tokens(1)], 1))
        assert torch.allclose(calls[f"after {length}"]()[0], y[:, -1], atol=1e-5)


def test_models_have_equal_parameters_and_the_named_densities():
    models = seqboat.models(load_head)
    sizes = sorted(sum(p.numel() for p in model.parameters()) for model in models.values())
    assert sizes[-1] < 1.001 * sizes[0]
    for name, density in seqboat.DENSITIES.items():
        with recorded(models[name]) as passes:
            models[name](torch.zeros(1, 2048, dtype=torch.int64))
        assert passes[0].density.tolist() == pytest.approx([density] * 4, abs=0.02)


def test_bars_belong_to_variants(monkeypatch):
    monkeypatch.setattr(seqboat, "LATE", 1200)
    monkeypatch.setattr(seqboat, "LENGTHS", (1024,))
    for comparison in seqboat.comparisons():
        assert {comparison.baseline, *comparison.bars} <= {*comparison.build(load_head)}
