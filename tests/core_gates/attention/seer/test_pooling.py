import itertools

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.gate import pool_blocks


@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_pooling_over_short_blocks(length, tokens):
    x = tokens(length, 2)
    pooled = pool_blocks(x, 4, ("max", "min", "avg"))
    assert pooled.shape == (2, -(-length // 4), 2, 18)
    for block in range(pooled.shape[1]):
        part = x[:, 4 * block : 4 * block + 4]
        expected = [part.amax(1), part.amin(1), part.sum(1) / part.shape[1]]
        assert_close(pooled[:, block], torch.cat(expected, -1))


@pytest.mark.fault("core A13")
def test_padding_is_not_pooled(tokens):
    x = tokens(13, 2, batch=3)
    padding = torch.rand(3, 13, generator=torch.Generator().manual_seed(2)) < 0.4
    padding[1, 4:8] = True
    holes = x.masked_fill(padding[..., None, None], torch.nan)
    pooled = pool_blocks(holes, 4, ("max", "min", "avg"), padding_mask=padding)
    assert pooled.shape == (3, 4, 2, 18)
    for row, block in itertools.product(range(3), range(4)):
        part = x[row, 4 * block : 4 * block + 4][~padding[row, 4 * block : 4 * block + 4]]
        parts = [part.amax(0), part.amin(0), part.mean(0)] if len(part) else [x.new_zeros(2, 18)]
        assert_close(pooled[row, block], torch.cat(parts, -1))
    nothing = torch.zeros(3, 13, dtype=torch.bool)
    kinds = ("min", "avg")
    assert_close(pool_blocks(x, 4, kinds, padding_mask=nothing), pool_blocks(x, 4, kinds))
