"""Tables of 8-bit integers: error bound, zero rows, memory."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.embedding.bank import EmbeddingBank, Int8Tables

TOY = runpy.run_path(str(Path(__file__).parents[2] / "fixtures" / "toy_ranker.py"))


@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_no_number_is_off_by_more_than_half_a_scale(seed, spread):
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(20, 5, generator=draw, dtype=torch.float64) * spread
    table *= torch.rand(20, 1, generator=draw, dtype=torch.float64) ** 8
    table[3] = 0
    made = Int8Tables.of(table)
    bound = table.abs().amax(1, keepdim=True) / 254
    error = (made.weight - table).abs()
    assert bool((error <= bound * (1 + 1e-12)).all())
    assert bool((error.amax(1) > 0).any())  # it was rounded at all
    assert torch.equal(made.weight[3], torch.zeros(5, dtype=torch.float64))
    rows = torch.tensor([[3, 19], [0, 0]])
    assert torch.equal(made(rows), made.weight[rows])


def test_a_bank_in_int8_is_smaller_close_and_cannot_grow():
    torch.manual_seed(0)
    bank = EmbeddingBank(TOY["schema"](), TOY["SIZES"], std=1.0)
    rows = TOY["rows"](30).sparse
    before, size = bank(rows).detach(), sum(4 * table.numel() for table in bank.tables())
    names = bank.named_tables().keys()
    bank.to_int8()
    after = sum(b.numel() * b.element_size() for s in bank.stacks.values() for b in s.buffers())
    assert after < size * 0.75
    assert bank.tables() == []
    assert bank.named_tables().keys() == names
    plain = [i for i, f in enumerate(bank.fields) if not f.buckets]
    gaps = (bank(rows) - before).split([f.dim for f in bank.fields], 1)
    assert 0 < max(float(gaps[i].abs().max()) for i in plain) < 4 / 254
    with pytest.raises(GatesError, match="Int8Tables cannot grow"):
        bank.grow({"video": 61})
