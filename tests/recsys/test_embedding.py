"""Embedding tables: banks, 8-bit tables, row-wise Adagrad."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from recsys.embedding.bank import EmbeddingBank, Int8Tables
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad, sum_by_row
from recsys.schema import FeatureSchema, Sparse, Task

from .conftest import TOY


def sparse_grad(places, values, shape):
    places = torch.as_tensor(places)
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True)


def gradient(seed, *, sparse, rows=9, dim=4):
    draw = torch.Generator().manual_seed(seed)
    places = torch.randint(0, rows, (12,), generator=draw)
    values = torch.randn(12, dim, dtype=torch.float64, generator=draw)
    grad = sparse_grad(places[None], values, (rows, dim))
    return grad if sparse else grad.to_dense()


def table():
    torch.manual_seed(3)
    return nn.Parameter(torch.randn(9, 4, dtype=torch.float64))


@pytest.mark.parametrize("sparse", [True, False])
def test_steps_follow_the_equations(sparse):
    mine = table()
    w, a = mine.detach().clone(), torch.full((9,), 0.3, dtype=torch.float64)
    optimizer = RowWiseAdagrad([mine], 0.1, eps=1e-3, l2=0.2, initial_accumulator_value=0.3)
    for step in range(4):
        mine.grad = gradient(step, sparse=sparse)
        optimizer.step()
        g = gradient(step, sparse=False)
        g = g + 0.2 * w * g.ne(0).any(1, keepdim=True)
        a = a + g.square().mean(1)
        w = w - 0.1 * g / (a.sqrt() + 1e-3)[:, None]
        assert_close(mine.detach(), w, rtol=0, atol=1e-13)


def test_rows_without_gradient_keep_their_bits_and_their_norm():
    mine = table()
    before = mine.detach().clone()
    optimizer = RowWiseAdagrad([mine], 0.1, l2=1.0)
    mine.grad = sparse_grad([[2, 2, 5]], torch.ones(3, 4).double(), (9, 4))
    optimizer.step()
    assert (mine != before).any(1).nonzero().flatten().tolist() == [2, 5]
    mine.grad = sparse_grad([[7]], torch.zeros(1, 4).double(), (9, 4))
    before = mine.detach().clone()
    assert optimizer.step(iter([3.0]).__next__) == 3  # one call gives the loss
    assert torch.equal(mine, before)


def test_accumulators_of_half_precision_tables_are_float32_also_when_loaded():
    mine = nn.Parameter(torch.randn(9, 4).bfloat16())
    optimizer = RowWiseAdagrad([mine], 0.1)
    mine.grad = sparse_grad([[2, 2]], torch.full((2, 4), 65 / 64).bfloat16(), (9, 4))
    optimizer.step()
    sums = optimizer.state[mine]["sum"]
    assert (sums.dtype, float(sums[2])) == (torch.float32, (65 / 32) ** 2)  # no bfloat16
    other = RowWiseAdagrad([mine], 0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[mine]["sum"], sums)
    assert other.state[mine]["sum"].dtype == torch.float32


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_sums_by_row_are_those_of_a_dense_table(rows):
    rows = torch.tensor(rows)
    values = torch.randn(len(rows), 3, dtype=torch.float64)
    distinct, sums = sum_by_row(rows, values)
    assert torch.equal(distinct, rows.unique())
    expected = torch.zeros(7, 3, dtype=torch.float64).index_add_(0, rows, values)
    assert_close(sums, expected[distinct], rtol=0, atol=1e-13)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"eps": 0}, {"l2": -1}, {"lr": float("nan")}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RowWiseAdagrad([table()], **wrong)


def test_only_tables_are_taken():
    with pytest.raises(ValueError, match=r"shape \(3,\): RowWiseAdagrad takes tables"):
        RowWiseAdagrad([nn.Parameter(torch.zeros(3))])


SIZES, TASKS = TOY["SIZES"], (Task("task"),)


def toy_bank():
    torch.manual_seed(0)
    return EmbeddingBank(TOY["schema"](), SIZES, std=1.0)


def by_hand(bank, rows):
    """Look every feature up in its own table, one after the other."""
    tables = bank.named_tables()
    parts = []
    for column, field in enumerate(bank.fields):
        mine = rows[:, column]
        if field.buckets:
            quotient = tables[f"{field.table}.quotient"][mine // field.buckets]
            parts.append(quotient * tables[f"{field.table}.remainder"][mine % field.buckets])
        else:
            parts.append(tables[field.table][mine])
    return torch.cat(parts, 1)


def test_vectors_are_those_of_each_table_in_the_order_of_the_features():
    bank = toy_bank()
    rows = TOY["rows"](50).sparse
    assert bank.out_dim == 4 + 6 + 4 + 4 + 2 + 4 + 2 + 4
    assert len(bank.stacks) == 3  # one gather for each width
    assert torch.equal(bank(rows), by_hand(bank, rows))


def test_the_parts_of_user_and_rest_hold_every_feature_once():
    bank = toy_bank()
    rows = TOY["rows"](20).sparse
    whole = by_hand(bank, rows).split([field.dim for field in bank.fields], 1)
    for part in ("user", "rest"):
        expected = torch.cat([whole[i] for i in bank.parts(part)], 1)
        assert torch.equal(torch.cat(bank.gather(rows, part), 1), expected)


def test_features_of_one_table_share_rows_and_histories_read_them():
    bank = toy_bank()
    rows = torch.arange(24).view(2, 12)
    assert torch.equal(bank.lookup("video", rows), bank.lookup("last_video", rows))
    assert torch.equal(bank.lookup("video", rows), bank.named_tables()["video"][rows])
    authors = bank.lookup("author", rows)
    tables = bank.named_tables()
    expected = tables["author.quotient"][rows // 5] * tables["author.remainder"][rows % 5]
    assert torch.equal(authors, expected)
    assert len(authors.flatten(0, 1).unique(dim=0)) == 24  # two small tables, no collisions


def test_gradients_are_sparse_and_those_of_dense_tables():
    bank, rows = toy_bank().double(), TOY["rows"](50).sparse
    weights = torch.randn(50, bank.out_dim, dtype=torch.float64)
    (bank(rows) * weights).sum().backward()
    found = [table.grad for table in bank.tables()]
    assert all(grad.is_sparse for grad in found)
    for stack in bank.stacks.values():
        stack.sparse, stack.weight.grad = False, None
    (bank(rows) * weights).sum().backward()
    for sparse, table in zip(found, bank.tables(), strict=True):
        assert_close(sparse.to_dense(), table.grad, rtol=0, atol=1e-13)
        assert len(sparse.coalesce().indices()[0]) < len(table)


def test_a_step_changes_the_rows_of_the_batch_and_no_others():
    bank = toy_bank()
    before = {name: table.clone() for name, table in bank.named_tables().items()}
    bank(torch.tensor([[5, 3, 7, 9, 2, 4, 6, 3]])).square().sum().backward()
    RowWiseAdagrad(bank.tables(), lr=0.1).step()
    changed = {
        name: (table != before[name]).any(1).nonzero().flatten().tolist()
        for name, table in bank.named_tables().items()
    }
    assert changed == {
        "video": [5, 9], "user": [3], "author.quotient": [1], "author.remainder": [2], "tab": [2],
        "city": [4], "user x tab": [6], "age": [3],
    }  # fmt: skip


def test_initial_values_have_their_standard_deviation():
    torch.manual_seed(0)
    sparse = (
        Sparse("a", storage="quotient_remainder", buckets=300),
        Sparse("b"),
    )
    bank = EmbeddingBank(FeatureSchema(tasks=TASKS, sparse=sparse), {"a": 90_000, "b": 3_000})
    found = bank(torch.stack([torch.randint(90_000, (3_000,)), torch.arange(3_000)], 1)).detach()
    for part in found.split(8, 1):
        assert float(part.std()) == pytest.approx(1e-2, rel=0.05)
        assert abs(float(part.mean())) < 3e-4


@given(st.dictionaries(st.sampled_from(["video", "user", "author", "tab"]), st.integers(0, 40)))
def test_growth_keeps_old_rows_and_their_accumulators_bit_for_bit(more):
    bank = toy_bank()
    optimizer = RowWiseAdagrad(bank.tables(), lr=0.1, initial_accumulator_value=0.5)
    rows = TOY["rows"](30).sparse
    bank(rows).square().sum().backward()
    optimizer.step()
    tables = {name: table.clone() for name, table in bank.named_tables().items()}
    sums = _sums_by_table(bank, optimizer)
    out = bank(rows).detach()
    bank.grow({name: SIZES[name] + number for name, number in more.items()}, optimizer)
    grown, grown_sums = bank.named_tables(), _sums_by_table(bank, optimizer)
    for name, table in tables.items():
        assert torch.equal(grown[name][: len(table)], table)
        assert torch.equal(grown_sums[name][: len(table)], sums[name])
        assert bool((grown_sums[name][len(table) :] == 0.5).all())
        fresh = grown[name][len(table) :]
        assert len(fresh.unique(dim=0)) == len(fresh)
    assert torch.equal(bank(rows), out)
    assert bank.sizes == SIZES | {name: SIZES[name] + number for name, number in more.items()}
    if more.get("video"):
        last = torch.full((1, 2), SIZES["video"] + more["video"] - 1)
        assert torch.equal(bank.lookup("video", last)[0, 0], grown["video"][-1])
    bank(rows).sum().backward()
    optimizer.step()


def _sums_by_table(bank, optimizer):
    found = {}
    for name, block in bank._blocks.items():
        state = optimizer.state[bank.stacks[str(block.dim)].weight]["sum"]
        found[name] = state[block.start : block.start + block.rows].clone()
    return found


def test_accumulators_that_did_not_grow_are_noticed():
    bank, rows = toy_bank(), TOY["rows"](30).sparse
    optimizer = RowWiseAdagrad(bank.tables())
    for _ in range(2):
        bank(rows).sum().backward()
        optimizer.step()
    bank.grow({"video": 61})
    bank(rows).sum().backward()
    with pytest.raises(GatesError, match="has 91 rows and 90 accumulators"):
        optimizer.step()


def test_a_table_never_shrinks_and_a_fixed_one_never_grows():
    bank = toy_bank()
    with pytest.raises(GatesError, match="'video' has 60 rows and cannot have 59: rows are never"):
        bank.grow({"video": 59})
    for name in ("city", "user x tab", "age"):
        with pytest.raises(GatesError, match="its size is fixed"):
            bank.grow({name: SIZES[name] + 1})


@pytest.mark.parametrize(("column", "row"), [(0, 60), (1, -1), (2, 33), (7, 6)])
def test_rows_of_no_table_are_refused(column, row):
    bank = toy_bank()
    rows = TOY["rows"](4).sparse
    rows[2, column] = row
    with pytest.raises(ValueError, match=rf"row {row} in column \d lies outside of its table"):
        bank(rows)
    name = bank.fields[column].name
    with pytest.raises(ValueError, match="lies outside"):
        bank.lookup(name, torch.tensor([[2, row]]))


def test_mistakes_are_named(refuses):
    bank = toy_bank()
    refuses(
        ValueError,
        (r"rows \(3, 7\) must be \(B, 8\)", lambda: bank(torch.zeros(3, 7, dtype=torch.int64))),
        (
            "sizes lacks the rows of the tables tab",
            lambda: EmbeddingBank(
                TOY["schema"](), {name: n for name, n in SIZES.items() if name != "tab"}
            ),
        ),
        ("must be at least 2, got 1", lambda: EmbeddingBank(TOY["schema"](), SIZES | {"tab": 1})),
    )
    shared = (Sparse("a", table="t"), Sparse("b", table="t", dim=3))
    with pytest.raises(ValueError, match="'a' and 'b' share the table 't' but not its dim"):
        EmbeddingBank(FeatureSchema(tasks=TASKS, sparse=shared), {"t": 5})


def test_a_bank_is_made_without_memory_and_filled_later():
    bank = EmbeddingBank(TOY["schema"](), SIZES, device="meta")
    assert bank.tables()[0].is_meta
    assert sum(t.numel() for t in bank.tables()) == sum(t.numel() for t in toy_bank().tables())


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
    assert (bank.tables(), bank.named_tables().keys()) == ([], names)
    plain = [i for i, f in enumerate(bank.fields) if not f.buckets]
    gaps = (bank(rows) - before).split([f.dim for f in bank.fields], 1)
    assert 0 < max(float(gaps[i].abs().max()) for i in plain) < 4 / 254
    with pytest.raises(GatesError, match="Int8Tables cannot grow"):
        bank.grow({"video": 61})
