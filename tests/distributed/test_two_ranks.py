"""The fixture ``two_ranks`` passes what is right on two ranks, and nothing else."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

FIXTURES = Path(__file__).parents[1] / "fixtures"


def train(parallel, shares=True):
    """Train a regression for a few steps; without shares, every rank on the same half."""
    torch.manual_seed(0)
    x = torch.randn(16, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    model = parallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        mine = parallel.share(x) if shares or parallel.strategy is None else x[:8]
        loss = (model(mine).squeeze(-1) - mine.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"weights": dict(net.named_parameters()), "steps": 3, "place": ("x", 0.5)}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_averaged_gradients_are_those_of_one_process(two_ranks, strategy):
    found = two_ranks(train, strategy=strategy, tolerance=1e-12)
    assert found["weights"]["0.weight"].shape == (8, 4)


def test_other_samples_are_noticed(two_ranks):
    with pytest.raises(AssertionError, match="rank 0, in units of the tolerance: /weights"):
        two_ranks(train, False, tolerance=1e-6)


def result(parallel):
    return {"a": [torch.ones(2), 1.0], "b": 3}


RIGHT = {"a": [torch.ones(2), 1.0], "b": 3}


@pytest.mark.parametrize(
    ("of_rank_1", "said"),
    [
        (RIGHT, None),
        ({"a": [torch.ones(2) + 1e-7, 1.0], "b": 3}, None),
        ({"a": [torch.ones(2) + 1e-5, 1.0], "b": 3}, "rank 1, .*: /a/0 is off by 5"),
        ({"a": [torch.ones(2), 1.1], "b": 3}, "/a/1 is off by"),
        ({"a": [torch.full((2,), torch.nan), 1.0], "b": 3}, "/a/0 is off by nan"),
        ({"a": [torch.ones(2).double(), 1.0], "b": 3}, "/a/0 is off by inf"),
        ({"a": [torch.ones(3), 1.0], "b": 3}, "/a/0 is off by inf"),
        ({"a": [torch.ones(2), 1.0], "b": 4}, "/b is off by inf"),
        ({"a": [torch.ones(2)], "b": 3}, "rank 1 returned"),
    ],
)
def test_every_leaf_of_every_rank_is_compared(of_rank_1, said):
    comparer = runpy.run_path(str(FIXTURES / "two_ranks.py"))["comparer"]
    check = comparer(lambda *_, **__: [RIGHT, of_rank_1])
    if said is None:
        check(result, tolerance=1e-6)
    else:
        with pytest.raises(AssertionError, match=said):
            check(result, tolerance=1e-6)


def nothing(parallel):
    return []


def test_a_function_must_return_something():
    comparer = runpy.run_path(str(FIXTURES / "two_ranks.py"))["comparer"]
    with pytest.raises(AssertionError, match="nothing to compare"):
        comparer(lambda *_, **__: [[], []])(nothing)
