import pytest
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks.comparison import load_head
from benchmarks.core import ops


@pytest.fixture
def small(monkeypatch):
    for name, value in (("TOKENS", 5), ("DIM", 12), ("RANK", 2)):
        monkeypatch.setattr(ops, name, value)
    monkeypatch.setattr(ops, "is_installed", lambda: False)


@pytest.mark.parametrize("backward", [False, True])
def test_variants_compute_the_same(backward, small):
    variants = ops.gated_lora(3, backward=backward).build(load_head)
    plain, ours, published = (variants[k]() for k in ("linear", "reference", "published gate"))
    if not backward:
        assert_close(ours, published)
        assert not torch.allclose(ours, plain)
        assert not ours.requires_grad
        return
    for mine, theirs in zip(ours, published, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert mine.abs().sum() > 0
    assert plain[0].shape == (5, 12)
    assert all(gradient is None for gradient in plain[1:])


def test_the_mode_is_that_of_the_variant(small, monkeypatch):
    from core_gates.ops import _select

    asked = []
    monkeypatch.setattr(_select, "_compiled", lambda function: asked.append(function) or function)
    variants = ops.gated_lora(3).build(load_head)
    reference = variants["reference"]()
    assert not asked
    assert_close(variants["compile"](), reference)
    assert asked


def test_peft_adds_the_plain_outputs():
    pytest.importorskip("peft")
    from core_gates.adapters.low_rank import LowRank

    linear = nn.Linear(12, 8)
    adapters = [LowRank(torch.randn(2, 12), torch.randn(8, 2), 0.5) for _ in range(3)]
    x = torch.randn(5, 12)
    expected = linear(x) + sum(x @ adapter.delta_weight().T for adapter in adapters)
    assert_close(ops.active_adapters(linear, adapters)(x), expected)
