import torch
from torch import distributed as dist
from torch.testing import assert_close

from core_gates.collectives import all_reduce, all_to_all, num_ranks


def sums_of_rank(values):
    x = values[dist.get_rank()].requires_grad_()
    first = torch.autograd.grad(all_reduce(x).pow(3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0]
    return {"sum": all_reduce(x).detach(), "first": first.detach(), "second": second}


def rows_of_rank(rows, sent, cotangents):
    rank = dist.get_rank()
    mine, received = rows[rank].requires_grad_(), [sizes[rank] for sizes in sent]
    arrived = all_to_all(mine, sent[rank], received)
    (arrived * cotangents[rank]).sum().backward()
    return arrived.detach(), mine.grad


ROWS = [torch.arange(5.0).view(5, 1), torch.empty(0, 1)]
COTANGENTS = [torch.tensor([[10.0], [20.0]]), torch.tensor([[30.0], [40.0], [50.0]])]


def all_on_rank(values, rows, cotangents, half):
    return {
        "sums": sums_of_rank(values),
        "rows": rows_of_rank(rows, [[2, 3], [0, 0]], cotangents),
        "half": rows_of_rank(half, [[1, 1], [1, 1]], [t.clone() for t in half]),
        "number": num_ranks(),
    }


def test_values_and_derivatives_on_two_ranks(ranks):
    values = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = [torch.ones(2, 1).bfloat16(), torch.zeros(2, 1).bfloat16()]
    first, second = ranks(all_on_rank, values, ROWS, COTANGENTS, half)
    total = values.sum(0)
    for found in (first, second):
        assert_close((found["sums"]["sum"], found["sums"]["first"]), (total, 2 * 3 * total**2))
        assert_close(found["sums"]["second"], 4 * 6 * total)
        assert found["number"] == 2
        for rows in found["half"]:
            assert (rows.flatten().tolist(), rows.dtype) == ([1, 0], torch.bfloat16)
    assert first["rows"][0].flatten().tolist() == [0, 1]
    assert second["rows"][0].flatten().tolist() == [2, 3, 4]
    assert first["rows"][1].flatten().tolist() == [10, 20, 30, 40, 50]
    assert second["rows"][1].shape == (0, 1)


def test_without_ranks_there_is_one():
    assert num_ranks() == 1
