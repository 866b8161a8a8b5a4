"""Row-wise Adagrad: its equations, touched rows, checkpoints."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from recsys.embedding.row_wise_adagrad import RowWiseAdagrad, sum_by_row


def sparse_grad(places, values, shape):
    places = torch.as_tensor(places)
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True)


def gradient(seed, *, sparse, rows=9, dim=4):
    draw = torch.Generator().manual_seed(seed)
    places = torch.randint(0, rows, (12,), generator=draw)
    values = torch.randn(12, dim, dtype=torch.float64, generator=draw)
    grad = sparse_grad(places[None], values, (rows, dim))
    return grad if sparse else grad.to_dense()


def train(table, optimizer, steps, *, sparse=True, first=0):
    for step in range(first, first + steps):
        table.grad = gradient(step, sparse=sparse)
        optimizer.step()
    return table.detach().clone()


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
    zero = sparse_grad([[7]], torch.zeros(1, 4).double(), (9, 4))
    mine.grad = zero
    before = mine.detach().clone()
    optimizer.step()
    assert torch.equal(mine, before)


def test_a_checkpoint_resumes_bit_for_bit():
    whole = table()
    expected = train(whole, RowWiseAdagrad([whole], 0.1), 6)
    first = table()
    optimizer = RowWiseAdagrad([first], 0.1)
    train(first, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0]["sum"].shape == (9,)
    second = nn.Parameter(first.detach().clone())
    resumed = RowWiseAdagrad([second], 0.7)
    resumed.load_state_dict(state)
    assert torch.equal(train(second, resumed, 3, first=3), expected)


def test_accumulators_of_half_precision_tables_are_float32_also_when_loaded():
    mine = nn.Parameter(torch.randn(9, 4).bfloat16())
    optimizer = RowWiseAdagrad([mine], 0.1)
    mine.grad = sparse_grad([[2, 2]], torch.rand(2, 4).bfloat16(), (9, 4))
    optimizer.step()
    sums = optimizer.state[mine]["sum"]
    assert sums.dtype == torch.float32
    other = RowWiseAdagrad([mine], 0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[mine]["sum"], sums)
    assert other.state[mine]["sum"].dtype == torch.float32


def test_a_closure_gives_the_loss():
    mine = table()
    optimizer = RowWiseAdagrad([mine], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = mine.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] < losses[0] / 2


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
