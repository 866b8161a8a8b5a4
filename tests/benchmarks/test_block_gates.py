"""Block gates next to plain attention: the same where all is kept, and bars belong to variants."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks import block_gates
from benchmarks.comparison import load_head


@pytest.fixture
def small(monkeypatch):
    sizes = {"LENGTH": 96, "LONG": 97, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(block_gates, name, value)


@pytest.mark.parametrize("make", [lambda: block_gates.prompt(64), lambda: block_gates.step(4)])
def test_where_everything_is_near_enough_the_output_is_that_of_plain(make, small, monkeypatch):
    comparison = make()
    monkeypatch.setattr(block_gates, "_selected", lambda load, *_: load(
        "core_gates.attention.seer.decode").BlockSelector(nz_ratio=1.0))  # fmt: skip
    calls = comparison.build(load_head)
    assert set(comparison.bars) <= set(calls) - {"SDPA"}
    ((part, whole),) = comparison.also.items()
    assert {part, whole} == set(calls) - {"SDPA"}
    assert_close(calls["gate and a tenth of the blocks"](), calls["SDPA"](), rtol=1e-4, atol=1e-4)


def test_a_tenth_of_the_blocks_is_kept(small, monkeypatch):
    monkeypatch.setattr(block_gates, "PROMPT_BARS", {2: 0.3})
    for comparison in (block_gates.prompt(2), block_gates.step(2)):
        calls = comparison.build(load_head)
        density = comparison.figures["realized density"].measure()
        assert 10 <= density < 12
        assert torch.isfinite(calls["gate and a tenth of the blocks"]()).all()
