import pytest
import torch

import benchmarks.core.ops as suite
from benchmarks.comparison import load_head


@pytest.mark.parametrize("share", suite.SHARES)
@pytest.mark.parametrize("block_size", suite.SPARSE_BARS)
def test_masks_keep_the_share_they_name(share, block_size):
    num_blocks = suite.LENGTH // block_size
    mask = suite.random_mask(num_blocks, share)[0, 0]
    assert mask.diagonal().all()
    assert not mask.triu(1).any()
    area = num_blocks * (num_blocks + 1) / 2
    assert mask.sum() / area == pytest.approx(share, abs=1 / area)


def test_every_variant_runs_and_has_a_bar(monkeypatch):
    monkeypatch.setattr(suite, "LENGTH", 512)
    for comparison in suite.attention_comparisons():
        calls = comparison.build(load_head)
        assert comparison.baseline in calls
        if "backward" not in comparison.name:
            assert set(calls) - {suite.BASELINE} <= comparison.bars.keys()
        plain = calls.pop(suite.BASELINE)()
        for name, call in calls.items():
            result = call()
            out = result if isinstance(result, torch.Tensor) else result[0]
            wanted = plain if isinstance(plain, torch.Tensor) else plain[0]
            same = torch.allclose(out, wanted, atol=1e-5)
            assert out.shape == wanted.shape
            assert same == (
                comparison.op == "block_max_attention"
                or name.startswith("100 %")
                or "dense_above" in name
            )


def test_a_step_of_decoding_is_compared_with_attention_to_as_many_keys(monkeypatch):
    monkeypatch.setattr(suite, "LENGTH", 64)
    monkeypatch.setattr(suite, "LONG", 1280)
    comparison, sparse = suite.decoding_comparisons()
    calls = comparison.build(load_head)
    assert calls.keys() == {comparison.baseline, *comparison.bars}
    assert calls["step"]().shape == (1, 1, 256)
    assert calls[comparison.baseline]().shape == (1, 2, 4, 128)
    calls = sparse.build(load_head)
    assert calls.keys() == {sparse.baseline, *sparse.bars}
    kept = [calls[name].args[3].sum(-1).flatten().tolist() for name in sparse.bars]
    assert kept == [[2, 2], [20, 20]]
    plain = calls.pop(sparse.baseline)().view(1, 8, 1, suite.HEAD_DIM)
    assert [torch.allclose(c(), plain, atol=1e-5) for c in calls.values()] == [False, True]
